from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from kv_lm_eval.cache.transfer import to_device
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import head_profile
from kv_lm_eval.methods.base import Method, Sight, View, setting
from kv_lm_eval.methods.head_profile import Head, HeadProfile

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts

UNIFORM = ("A_window", "B_streaming", "K_uniform")
PRESETS: dict[str, dict[str, Any]] = {
    "A_window": {"n_sink": 0},
    "B_streaming": {},
    "K_uniform": {},
    "G_conf": {
        "confidence": 0.6,
        "base_window": 128,
        "positional_window": 16,
        "mixed_window": 64,
        "gathering_window": 256,
    },
    "I_inverse": {"positional_window": 256, "mixed_window": 64, "gathering_window": 128},
    "J_small_gathering": {"positional_window": 16, "mixed_window": 64, "gathering_window": 128},
}
G_CONF_64 = {"positional_window": 8, "gathering_window": 128}  # what the ablation used with base_window=64
WINDOWS = ("positional_window", "mixed_window", "gathering_window", "dead_window")


class HeadAware(Method):
    """Each KV head keeps n_sink first tokens and a recent window of its own, by the type of its query heads.

    A window counts the query's own token: a query sees the first n_sink tokens and those less than window away. A dead
    head sees itself alone, unless dead_window is given. Under grouped-query attention a KV head keeps what the widest
    window of its query heads needs. mode=cache really drops pairs after each cut, n_sink + window - 1 stay, so that a
    cut at every token equals mode=simulate wherever the query heads of each KV head have equal windows; the prompt's
    own forward is full attention, cut after it. mode=simulate hides pairs by a mask for every query head, in the
    prompt too: it saves no memory and no time, and reports what a cache would hold.

    Presets (the ablation of cny123222/LLM-Efficient-Reasoning@e6d4453): A_window, window only; B_streaming,
    base_window tokens in all, sinks among them; K_uniform, sinks + base_window; G_conf, the window of its type for a
    head at or over `confidence`, base_window for the others; I_inverse, positional heads see most; J_small_gathering.

    A profile may also be a DuoAttention pattern, full_attention_heads.tsv with its config.json, or their folder: the
    KV heads with the smallest numbers, a share of `sparsity` or those below one half, keep the first sink_size and the
    last recent_size tokens of every prompt and answer, the others everything. n_sink and positional_window change this.

    Reference: cny123222/LLM-Efficient-Reasoning, kvcompress/methods/head_aware_compress.py (masks). No paper.
    DuoAttention: arXiv:2410.10819; mit-han-lab/duo-attention, duo_attn/utils.py; NVIDIA/kvpress,
    duo_attention_press.py.
    Deviations: the reference only masks; K_uniform takes no profile (all its types have one window). DuoAttention: of
    equal numbers the earlier heads get the window (the authors add noise), and as many as `sparsity` says to the head;
    the prompt's own forward is full attention, as in kvpress.
    """

    paper = ""
    presets = {"compress_every": 1}
    takes_budget = False
    capacity_settings = ("base_window",)

    profile: str | None = setting(
        None, "file of scripts/analyze_heads.py, or a DuoAttention pattern; None: all heads get base_window"
    )
    sparsity: float | None = setting(
        None, "of a DuoAttention pattern: share of the KV heads that have a window; None: those below one half"
    )
    preset: str | None = setting(
        None, "windows as in the published ablation; single ones may be changed", tuple(PRESETS)
    )
    positional_window: int | None = setting(None, "tokens for positional heads, -1: all; None: the profile's own")
    mixed_window: int | None = setting(None, "the same for mixed heads")
    gathering_window: int | None = setting(None, "the same for gathering heads")
    dead_window: int | None = setting(None, "the same for dead heads; None: the query's own token only, no sinks")
    confidence: float | None = setting(None, "heads whose type is less sure than this get base_window")
    base_window: int | None = setting(None, "window of heads without a trusted type; without a profile, of all")
    n_sink: int | None = setting(None, "first tokens that every head keeps; None: 4, with preset=A_window 0")
    mode: str = setting("cache", "really drop pairs, or hide them by masks and save nothing", ("cache", "simulate"))

    # ------------------------------------------------------------------------------------ settings

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {"preset": "B_streaming", "base_window": slots, "compress_every": 16}

    def validate(self) -> None:
        for name in (*WINDOWS, "base_window"):
            value = getattr(self, name)
            if value is not None and value < 1 and value != -1:
                raise UserError(f"{name}={value} is not a window: a number of tokens, at least 1, or -1 for all")
        if self.n_sink is not None and self.n_sink < 0:
            raise UserError(f"n_sink={self.n_sink} is negative; 0 means no sinks")
        if self.confidence is not None and not 0 < self.confidence <= 1:
            raise UserError(f"confidence={self.confidence:g} is outside (0, 1]: it is the least confidence of a type")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise UserError(
                f"sparsity={self.sparsity:g} is outside [0, 1]: it is the share of heads that have a window"
            )
        if self.sparsity is not None and not self._duo:
            raise UserError(
                f"sparsity={self.sparsity:g} has no effect without a DuoAttention pattern, profile=DIR/"
                f"{head_profile.DUO}"
            )
        if self.profile is None:
            self._validate_uniform()
            return
        if self._duo:
            self._validate_duo()
            return
        if self.preset in UNIFORM:
            raise UserError(f"profile={self.profile} has no effect: preset={self.preset} treats all heads alike")
        if (self._value("confidence") is None) != (self._value("base_window") is None):
            raise UserError(
                "with a profile, confidence and base_window go together: heads below the one get the other; got "
                f"confidence={self.confidence}, base_window={self.base_window}"
            )
        assert self._profile

    def _validate_duo(self) -> None:
        others = ("preset", "mixed_window", "gathering_window", "dead_window", "confidence", "base_window")
        if given := [name for name in others if getattr(self, name) is not None]:
            raise UserError(
                f"{given[0]}={getattr(self, given[0])} has no effect with a DuoAttention pattern, whose heads keep "
                "everything or first and last tokens: n_sink and positional_window say how many"
            )
        if self.hides:
            raise UserError(
                "mode=simulate hides pairs from query heads, and a DuoAttention pattern names KV heads; use mode=cache"
            )
        assert self._profile

    def _validate_uniform(self) -> None:
        typed = [n for n in (*WINDOWS, "confidence") if getattr(self, n) is not None]
        if typed or (self.preset and self.preset not in UNIFORM):
            what = f"{typed[0]}={getattr(self, typed[0])}" if typed else f"preset={self.preset}"
            raise UserError(
                f"{what} depends on the types of heads, which a profile holds: add profile=FILE, written by "
                "scripts/analyze_heads.py for this model"
            )
        if self.base_window is None:
            raise UserError(
                "head_aware needs a profile=FILE (scripts/analyze_heads.py writes it), or base_window=TOKENS for all "
                "heads alike"
            )
        sinks, window = self._base
        if window is None:
            raise UserError("base_window=-1 without a profile lets all heads keep everything: that is method=full")
        if window < 1 or sinks + window < 2:
            raise UserError(
                f"base_window={self.base_window} with {sinks} sinks leaves nothing but the query's own token; it must "
                f"be at least {self._sinks + 1 if self.preset == 'B_streaming' else 2}"
            )

    def _value(self, name: str) -> Any:
        """A setting as given, or else as the preset has it."""
        given = getattr(self, name)
        if given is not None or self.preset is None:
            return given
        if self.preset == "G_conf" and self.base_window == 64 and name in G_CONF_64:
            return G_CONF_64[name]
        return PRESETS[self.preset].get(name)

    @property
    def _sinks(self) -> int:
        value = self._value("n_sink")
        own = self._profile.sinks if self._duo and self._profile else None
        return value if value is not None else 4 if own is None else own

    @property
    def _base(self) -> tuple[int, int | None]:
        """Sinks and window of a head without a trusted type."""
        window = self._value("base_window")
        if self.preset == "B_streaming" and window != -1:
            window -= self._sinks
        return self._sinks, None if window == -1 else window

    @cached_property
    def _profile(self) -> HeadProfile | None:
        if self.profile is None:
            return None
        return head_profile.load_duo(self.profile, self.sparsity) if self._duo else head_profile.load(self.profile)

    @cached_property
    def _duo(self) -> bool:
        """Whether the profile is a DuoAttention pattern."""
        return self.profile is not None and head_profile.is_duo(self.profile)

    def _span(self, head: Head) -> tuple[int, int | None]:
        """Sinks and window of one query head."""
        least = self._value("confidence")
        if least is not None and head.confidence < least:
            return self._base
        window = self._value(f"{head.type}_window")
        if window is None and head.type == "dead":
            return 0, 1
        window = head.window if window is None else window
        return self._sinks, None if window == -1 else window

    @cached_property
    def spans(self) -> tuple[tuple[tuple[int, int | None], ...], ...]:
        """Sinks and window of every query head, by layer; without a profile one entry that stands for all."""
        if self._profile is None:
            return ((self._base,),)
        return tuple(tuple(map(self._span, layer)) for layer in self._profile.heads)

    # ------------------------------------------------------------------------------------ the cache

    @property
    def own_capacity(self) -> int | None:
        sinks, window = self._base
        return None if self._profile or window is None else sinks + window - 1

    @cached_property
    def _slots(self) -> tuple[tuple[int | None, ...], ...] | None:
        if self._profile is None:
            return None
        group = self._profile.num_heads // self._profile.num_kv_heads
        return tuple(
            tuple(_union(layer[first : first + group]) for first in range(0, len(layer), group)) for layer in self.spans
        )

    @property
    def head_slots(self) -> tuple[tuple[int | None, ...], ...] | None:
        return self._slots

    @property
    def sinks_and_recent(self) -> int | None:
        return None if self._profile or self.hides else self._sinks

    @property
    def hides(self) -> bool:
        return self.mode == "simulate"

    def sight(self, layer: int) -> Sight | None:
        if not self.hides:
            return None
        sinks, windows = zip(*self.spans[layer if self._profile else 0], strict=True)
        return Sight(sinks, windows)

    @property
    def without_effect(self) -> dict[str, str]:
        mask = "mode=simulate hides pairs from every query by position and drops none"
        alone = "the budget of every head is fixed by its window"
        mean = "it counts slots over the mean of the heads, which have windows of their own"
        out = {}
        if self.hides:
            names = (
                "compress_every",
                "trigger",
                "cache_slack",
                "max_drop",
                "evicted",
                "rolling_compress_every",
                "prefill_evict",
            )
            out.update(dict.fromkeys(names, mask))
        elif self._profile:
            out.update(dict.fromkeys(("trigger", "cache_slack", "max_drop"), mean))
        totals = ("max_capacity_prompt", "keep_ratio", "compression_ratio", "threshold")
        budget = (*totals, "prune_after", "threshold_recent")
        return {**out, **dict.fromkeys((*budget, "layer_budget", "beta", "head_budget", "alpha", "rounding"), alone)}

    def check_model(self, facts: ModelFacts) -> None:
        profile = self._profile
        if profile is None:
            return
        if profile.of_kv_heads:
            theirs = sorted({kv_heads for _, kv_heads in facts.heads.values()})
            if profile.num_layers != facts.num_layers or theirs != [profile.num_kv_heads]:
                raise UserError(
                    f"profile={self.profile} was made for {profile.model} ({profile.num_layers} layers of "
                    f"{profile.num_kv_heads} KV heads); this model has {facts.num_layers} layers of {theirs} KV heads"
                )
            return
        ours = (profile.num_heads, profile.num_kv_heads)
        if profile.num_layers != facts.num_layers or any(heads != ours for heads in facts.heads.values()):
            found = sorted(set(facts.heads.values()))
            raise UserError(
                f"profile={self.profile} was made for {profile.model} ({profile.num_layers} layers of {ours[0]} query "
                f"and {ours[1]} KV heads); this model has {facts.num_layers} layers with (query, KV) heads {found}. "
                "Make one for this model with scripts/analyze_heads.py."
            )

    def score(self, view: View) -> torch.Tensor:
        """[B, 1 or K, N]: the sinks always, but in heads that keep none, then the newest."""
        score, first = view.pos.float(), view.first(self._sinks)
        slots = None if self._slots is None else self._slots[view.layer]
        if slots is not None:
            keeps_sinks = [n is None or n >= self._sinks for n in slots]  # a dead head keeps nothing
            first = first & to_device(keeps_sinks, first.device).view(1, -1, 1)
            score = score.expand_as(first)
        return score.masked_fill(first, float("inf"))

    # ------------------------------------------------------------------------------------ numbers

    def effective_context(self, n: int) -> float:
        """Tokens that a query with n tokens up to and including itself sees, mean over all query heads."""
        return _mean([_within(span, n) for layer in self.spans for span in layer])

    def cache_slots(self, n: int) -> float:
        """Slots per KV head and layer that a cache holds when the n-th token attends: unions over query heads."""
        if self._slots is None:
            return self.effective_context(n)
        return _mean([n if most is None else min(n, most + 1) for layer in self._slots for most in layer])

    def notes(self) -> dict[str, Any]:
        if self._profile is None:
            return {}
        return {
            "profile_sha256": self._profile.sha256,
            "profile_model": self._profile.model,
            "profile_heads": self._profile.counts(),
        }

    def warnings(self, facts: ModelFacts) -> list[str]:
        n = facts.max_positions or 4096
        seen, held = self.effective_context(n), self.cache_slots(n)
        out = []
        if self.hides:
            out.append(
                "mode=simulate hides pairs and keeps all of them: memory and speed are those of the full cache. At "
                f"{n} tokens a query sees {seen:.0f} on average over the heads; a real cache (mode=cache) would hold "
                f"{held:.0f} slots per KV head and layer, {100 * held / n:.1f} % of the full one"
            )
        elif held > 1.25 * seen:
            out.append(
                f"query heads ask for {seen:.0f} of {n} tokens on average, but a KV head keeps what the widest of its "
                f"query heads needs: {held:.0f}"
            )
        if held == n:
            out.append(f"no head drops anything in {n} tokens: this is the full cache")
        return out


def _union(spans: tuple[tuple[int, int | None], ...]) -> int | None:
    """Slots that serve all of these query heads after a cut; the next query adds itself."""
    sizes = [None if window is None else sinks + window - 1 for sinks, window in spans]
    return None if None in sizes else max(size for size in sizes if size is not None)


def _within(span: tuple[int, int | None], n: int) -> int:
    return n if span[1] is None else min(n, span[0] + span[1])


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)
