"""The self-check at wrap time: does this model, through our attention, still say what it said before?

Some twenty forwards of a few dozen tokens at most: seconds on one CPU core for half a billion parameters. It compares
logits without compression with the model's own attention on every road that the settings will use: forwards with left
padding, a chunk, single tokens; generate(), after chunks or before the question where these are set, compiled if that
is set; choices packed or in forks. So a version of transformers whose code is not what ours relies on is refused
rather than believed. What cannot be done exactly is refused with the reason. A second probe says whether keys can be
moved in position, for the methods that need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kv_lm_eval.cache import hook
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.cache.rope import RopeKit
from kv_lm_eval.engine import outputs, positions, sharded
from kv_lm_eval.engine.choices import How, score_in_forks, score_packed
from kv_lm_eval.engine.compiled import Decoder
from kv_lm_eval.engine.forward import device_of, generate_with, logits_of
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.engine.generate import by_rows
from kv_lm_eval.engine.prefill import NewCache, prefill
from kv_lm_eval.engine.rounding import BOUND, Rounding
from kv_lm_eval.engine.start import start
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import Compression

LENGTHS = (20, 13)  # tokens of the two left-padded rows
STEPS = (5, 1, 1)  # then a chunk and two single tokens
GENERATED = 3  # tokens of an answer: from the prompt, from the first step, and from one like all others
CHUNK = 8  # tokens of a chunk, where prompts go in chunks
TAILS = (6, 3)  # tokens of the two questions, where they come after the compression


@dataclass(frozen=True)
class Roads:
    """What the settings will ask of the engine, beside plain prompts and choices."""

    chunks: bool = False
    question: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Probe:
    """Two rows of random tokens, as long as all steps together: ids, mask and positions [B, N]."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel) -> Probe:
        """The same rows for every model of one vocabulary; without tokens at which generate() would stop."""
        stops = torch.as_tensor(model.generation_config.eos_token_id or []).flatten().tolist()
        usable = torch.tensor([t for t in range(model.config.get_text_config().vocab_size) if t not in stops])
        total = max(LENGTHS) + sum(STEPS)
        picked = torch.randint(0, len(usable), (len(LENGTHS), total), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(len(LENGTHS), total, dtype=torch.long)
        for row, length in enumerate(LENGTHS):
            mask[row, : max(LENGTHS) - length] = 0
        device = device_of(model)
        return cls(usable[picked].to(device), mask.to(device), (mask.cumsum(1) - 1).clamp_min(0).to(device))

    def alone(self) -> list[Probe]:
        """Each row without its padding."""
        skipped = [slice(max(LENGTHS) - length, None) for length in LENGTHS]
        return [
            Probe(self.ids[None, i, part], self.mask[None, i, part], self.positions[None, i, part])
            for i, part in enumerate(skipped)
        ]

    @property
    def rows(self) -> list[list[int]]:
        """The prompts, up to where the steps begin."""
        return [ids[-n:].tolist() for ids, n in zip(self.ids[:, : max(LENGTHS)], LENGTHS, strict=True)]

    @property
    def later(self) -> torch.Tensor:
        """The tokens after the prompts, [B, all steps]."""
        return self.ids[:, max(LENGTHS) :]


def wrap(model: PreTrainedModel, compression: Compression, roads: Roads = Roads()) -> ModelFacts:
    """Puts our attention under the model, proves that it changes nothing, and returns what was learned.

    Raises:
        UserError: the model cannot be served exactly; the message says why. The model is left as it was.
    """
    original = model.config._attn_implementation
    if original == hook.NAME:  # wrapped before, for another method
        original = getattr(model, "_kv_own_attention", "sdpa")
    kind = type(model).__name__
    if not model._can_set_attn_implementation():
        raise UserError(
            f"{kind} does not let its attention function be chosen (transformers' AttentionInterface), so its KV cache "
            "cannot be compressed exactly. Use method=no_cache or --model hf for it."
        )
    hook.register()
    config = model.config.get_text_config()
    facts = ModelFacts(config.num_hidden_layers, getattr(config, "max_position_embeddings", None))
    try:
        probe = Probe.of(model)
        expected = _logits(model, probe, lambda: DynamicCache(config=config), original)
        got = _logits(model, probe, lambda: CompressedCache(FULL, facts), hook.ASKING)
        rounding = Rounding(model.dtype, partial(_apart_from_itself, model, probe, expected, original))
        _compare_forwards(kind, expected, got, rounding)
        model.set_attn_implementation(hook.NAME)
        facts.rope = RopeKit(model, facts.modules)
        facts.border, facts.settles = positions.border(model, facts)
        if roads.compiled and facts.border is not None and not facts.settles:
            raise UserError(
                f"compile=True: beyond {facts.border} tokens {kind} rotates by frequencies that every token changes, "
                "which a compiled step cannot; leave compile out"
            )
        if compression.moves_keys is not None:
            positions.check(model, facts, kind, compression)
        compression.check_model(facts)
        facts.ranks = getattr(model, "tp_size", None) or 1
        outputs.find(model, facts, FULL)
        if compression.method.projects or compression.method.reads_effects:
            outputs.check(facts, kind, compression.method.name)
        sharded.check(compression, facts.ranks)
        after, new_cache = _after_each(expected), partial(make_cache, FULL, facts, CHUNK if roads.chunks else None)
        _compare_generated(model, probe, new_cache, roads, after, rounding)
        _check_choices(model, probe, new_cache, compression.schedule.online, after)
    except UserError as error:
        model.set_attn_implementation(original)
        if kind in str(error):
            raise
        raise UserError(f"{kind} does not pass the self-check: {error}") from error
    except Exception as error:
        model.set_attn_implementation(original)
        raise UserError(
            f"{kind} did not pass the self-check, its KV cache cannot be compressed: {type(error).__name__}: {error}"
        ) from error
    model.set_attn_implementation(hook.NAME)
    model._kv_own_attention = original
    return facts


@torch.inference_mode()
def _logits(model: PreTrainedModel, probe: Probe, new_cache: Any, implementation: str) -> list[torch.Tensor]:
    """Logits of the real tokens of a left-padded prefill, a chunk and single steps: a row for each, float32."""
    model.set_attn_implementation(implementation)
    cache, out, begin = new_cache(), [], 0
    for step in (probe.ids.shape[1] - sum(STEPS), *STEPS):
        end = begin + step
        part = slice(begin, end)
        logits = logits_of(
            model, probe.ids[:, part], positions=probe.positions[:, part], mask=probe.mask[:, :end], cache=cache
        )
        out.append(logits[probe.mask[:, part].bool()].float())
        begin = end
    return out


def _apart_from_itself(
    model: PreTrainedModel, probe: Probe, expected: list[torch.Tensor], implementation: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The model's own logits of the rows together, as given, and of each row alone: pairs as `_parts` has them."""
    now, config = model.config._attn_implementation, model.config.get_text_config()
    try:
        each = [_logits(model, row, lambda: DynamicCache(config=config), implementation) for row in probe.alone()]
    finally:
        model.set_attn_implementation(now)
    alone = [torch.cat(step) for step in zip(*each, strict=True)]
    return [(a, b) for (_, a), (_, b) in zip(_parts(expected), _parts(alone), strict=True)]


def _parts(logits: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """What `_logits` gives, by the kind of forward."""
    return [("prefill", logits[0]), ("chunk", logits[1]), ("decode", torch.cat(logits[2:]))]


def _compare_forwards(kind: str, expected: list[torch.Tensor], got: list[torch.Tensor], rounding: Rounding) -> None:
    """Refuses a model whose logits differ through our attention."""
    for (name, a), (_, b) in zip(_parts(expected), _parts(got), strict=True):
        if (error := rounding.beyond(a, b)) is not None:
            raise UserError(
                f"{kind} does not pass the self-check: without any compression, its {name} logits through our "
                f"attention differ from its own by {error}. It probably shares caches between layers or uses attention "
                "that we do not reproduce, so its results would be wrong."
            )


# ---------------------------------------------------------------------------------------------------- roads


def _compare_generated(
    model: PreTrainedModel,
    probe: Probe,
    new_cache: NewCache,
    roads: Roads,
    after: torch.Tensor,
    rounding: Rounding,
) -> None:
    """Refuses a model, or a version of transformers, that generates otherwise on a road that the settings will use.

    Args:
        after: logits of the model's own forwards, see `_after_each`.
    """
    decoder = Decoder(model, backend=None) if roads.compiled else None
    ways = {"generate()": _generated(model, probe, new_cache, None, decoder)}
    if roads.question:
        ways["generate() after the question"] = _generated(model, probe, new_cache, TAILS, decoder)
    for name, got in ways.items():
        if (error := rounding.beyond(after[:, : got.shape[1]].flatten(0, 1), got.flatten(0, 1))) is not None:
            words = " after chunks" if roads.chunks else ""
            raise UserError(
                f"{type(model).__name__} does not pass the self-check: without any compression, the logits of "
                f"{name}{words} differ from those of its own forwards by {error}. Probably this version of "
                "transformers prepares the inputs of generate() in another way than those that were tried (see "
                "kv_versions in a results file), so generated answers would be wrong."
            )


def _after_each(expected: list[torch.Tensor]) -> torch.Tensor:
    """The logits after the prompts and after each later token, [B, 1 + all steps, V] float32."""
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    return torch.cat([expected[0][ends][:, None], *(e.unflatten(0, (len(LENGTHS), -1)) for e in expected[1:])], dim=1)


class _Forced(LogitsProcessor):
    """Makes generate() choose given tokens, [B, n], whatever the logits."""

    def __init__(self, tokens: torch.Tensor, width: int) -> None:
        self._tokens, self._width = tokens, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self._tokens[:, input_ids.shape[1] - self._width, None].to(scores.device)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


@torch.no_grad()  # not inference_mode: as generate() will be run
def _generated(
    model: PreTrainedModel,
    probe: Probe,
    new_cache: NewCache,
    tails: Sequence[int] | None,
    decoder: Decoder | None,
) -> torch.Tensor:
    """Logits after the prompts and after the next tokens, [B, GENERATED, V] float32, from generate()."""
    count = min(GENERATED, probe.later.shape[1])
    cache, ids, mask, _ = start(model, new_cache, probe.rows, tails, pad=int(probe.ids[0, 0]))
    config = GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    loop = by_rows(cache, compiled=decoder is not None)
    with nullcontext() if decoder is None else decoder.decoding(cache, count):
        out: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([_Forced(probe.later, ids.shape[1])]),
            **generate_with(cache),
            **loop,
        )
    return torch.stack([step.float() for step in out.logits], dim=1)


@torch.inference_mode()
def _check_choices(
    model: PreTrainedModel,
    probe: Probe,
    new_cache: NewCache,
    forks: bool,
    after: torch.Tensor,
) -> None:
    """The same for choices: the next tokens of each row, and all but the first of them, as two continuations."""
    later = probe.later.tolist()
    cache, first = prefill(model, new_cache, probe.rows)
    score = score_in_forks if forks else score_packed
    got = score(model, cache, first, [[row[:3], row[:2]] for row in later], How(torch.float32))
    log_probs = after.log_softmax(-1)
    chosen = log_probs[:, :3].gather(2, probe.later[:, :3, None].to(after.device)).squeeze(2)
    for b, (long, short) in enumerate(got):
        pairs = ((float(chosen[b].sum()), long[0]), (float(chosen[b, :2].sum()), short[0]))
        apart = max(abs(x - y) / max(1.0, abs(x)) for x, y in pairs)
        allowed = 10 * BOUND.get(model.dtype, 1e-1)
        if not apart <= allowed:
            raise UserError(
                f"{type(model).__name__} does not pass the self-check: without any compression, log-likelihoods of "
                f"continuations over one prefill differ from those of its own forwards by {apart:.1e} (relative, "
                f"allowed {allowed:.0e}), so choices would be scored wrongly."
            )
