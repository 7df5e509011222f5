"""The words in which a compression method is written, and its discovery by file name.

A method is a scorer: it gives every slot of a layer's cache a number, and the slots with the highest numbers stay.
How many stay is the budget (`budget.py`), when it happens is the schedule (`schedule.py`), and what becomes of the
others is the treatment of the evicted (`evicted.py`). The four compose freely; a published method is a preset.

Shapes: B batch rows, H query heads, K KV heads, G = H / K, W last queries, N slots, D head size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from typing_extensions import dataclass_transform

from kv_lm_eval.cache.view import Pages as Pages
from kv_lm_eval.cache.view import Sight as Sight
from kv_lm_eval.cache.view import View as View
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.methods import names
from kv_lm_eval.methods.names import available as available

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts, Words


def setting(default: Any = dataclasses.MISSING, help: str = "", choices: tuple[Any, ...] = ()) -> Any:
    """One hyper-parameter: its default, what it means in a sentence (with its unit), and what it may be."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


ROUNDING = 2**-18  # relative, of float32 sums made in another order


class Reading(NamedTuple):
    """Tokens that are fed a second time: those from `first` to `last` - 1 of the text are scored by their attention."""

    first: int
    last: int
    tokens: list[int]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting,))
class Method:
    """A scorer and its presets. Subclasses are frozen dataclasses: their fields are their hyper-parameters.

    A subclass needs `score`; everything else has a default that fits a method which compresses once, after the
    prefill, to the budget the user names.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""  # of a user's own method: its file and the sha256 of its text
    presets: ClassVar[dict[str, Any]] = {}  # defaults of the other three parts, e.g. {"compress_every": 1}
    accumulates: ClassVar[bool] = False  # score() reads view.mass, the attention summed over all queries
    every_query: ClassVar[bool] = False  # score() reads view.queries of all since the last cut, and num_queries before
    projects: ClassVar[bool] = False  # score() or rescore() reads view.output_norms
    reads_hidden: ClassVar[bool] = False  # note() reads view.hidden, and what it says of each token is remembered
    needs_training: ClassVar[bool] = False  # it scores by weights trained for one model, which are in a file
    rotates: ClassVar[bool] = False  # score() reads view.rotate: only models whose keys can be moved in position
    reads_again: ClassVar[bool] = False  # score() reads view.reread, for which `readings` are fed before each cut
    compresses: ClassVar[bool] = True  # False: everything is kept, no budget is taken
    takes_budget: ClassVar[bool] = True  # False: its own settings always fix the budget, and no other is taken
    capacity_settings: ClassVar[tuple[str, ...]] = ()  # those that fix the budget by themselves (own_capacity)
    ring: ClassVar[bool] = False  # a new token overwrites the oldest: see cache/ring.py; needs sinks_and_recent
    slotwise: ClassVar[bool] = False  # a slot's score is the same wherever it stands: cuts may leave holes in between
    evicts_in_prefill: ClassVar[bool] = False  # prefill_evict may cut between chunks: it makes sense online
    uses_cache: ClassVar[bool] = True  # False: the model recomputes everything (use_cache=False)

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.accumulates + cls.reads_again + cls.reads_hidden > 1:
            raise TypeError(
                f"{cls.__name__}: accumulates, reads_again and reads_hidden fill the same numbers; take one"
            )
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def around(cls, settings: Mapping[str, Any]) -> type[Method]:
        """The class that these settings are of: itself; a method that wraps a scorer makes one of both.

        Raises:
            UserError: that scorer cannot be wrapped.
        """
        return cls

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        """Settings that show the method at `slots` pairs per KV head and layer, at least 8, on prompts of a few hundred
        tokens: the quick start, the tables of the docs and the tests take them.

        By default the budget alone; cuts that would come at every token come every 16, but for a ring's.
        """
        if not cls.compresses:
            return {}
        every = {"compress_every": 16} if cls.presets.get("compress_every") and not cls.ring else {}
        return {"max_capacity_prompt": slots, **every}

    def score(self, view: View) -> torch.Tensor:
        """Higher stays. [B, K, N] (each KV head chooses its own slots) or [B, 1, N] (all heads the same); +inf: always.

        Empty slots are handled by the caller; computed in float32 so that ties are real ties.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score()")

    def rescore(self, view: View, scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Scores [B, 1 or K, N] by which slots are chosen, where these depend on how many a head keeps: counts [B, 1 or
        K], on the host, by `scores`, those of `score`. What is always kept stays +inf."""
        return scores

    def note(self, view: View) -> torch.Tensor:
        """What `view.remembered` shall hold for the newest q tokens, [B, K, q], those of `view.hidden`: asked after
        each forward that stores tokens, for methods with `reads_hidden`."""
        raise NotImplementedError(f"{type(self).__name__} has no note()")

    def weights(self, view: View) -> torch.Tensor | None:
        """Attention that each token received, [B, K, N] float32, for treatments that average pairs; None: not known."""
        return None

    @property
    def num_queries(self) -> int:
        """How many of the last queries `score` asks `view.attention` or `view.queries` for; 0 if none."""
        return 0

    def readings(self, text: Sequence[int], done: int, words: Words) -> list[Reading]:
        """What is fed again before a cut, and thrown away, of a row's text so far, of which the first `done` tokens
        were read again before; for methods with `reads_again`."""
        raise NotImplementedError(f"{type(self).__name__} has no readings()")

    @property
    def reads_effects(self) -> bool:
        """Whether `view.reread` is attention times the length of the value behind the output projection, over that of
        the hidden state that the query was made of."""
        return False

    @property
    def reread_sinks(self) -> int:
        """How many of the first tokens each reading sees beside what it is of."""
        return 0

    @property
    def protected(self) -> int:
        """How many slots `score` always keeps; a budget must leave room for more than these."""
        return 0

    @property
    def reads_budget(self) -> bool:
        """Whether what `score` always keeps is a share of the budget (`view.keep`), which then must be a number."""
        return False

    @property
    def own_capacity(self) -> int | None:
        """The budget in slots where the method's own settings fix it (sinks + window); None: the user names one."""
        return None

    @property
    def head_slots(self) -> tuple[tuple[int | None, ...], ...] | None:
        """The budget in slots of each KV head, by layer, where the method's own settings fix it; None within: all
        tokens. None: all heads are alike, `own_capacity` says how many."""
        return None

    @property
    def hides(self) -> bool:
        """Whether pairs beyond the budget stay in memory and are hidden by `sight`: a simulation of a cache."""
        return False

    def sight(self, layer: int) -> Sight | None:
        """What the queries of a layer may see; None: all that is held."""
        return None

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings of the other parts that do nothing with this method as it is set, and why: they are refused."""
        return {}

    @property
    def in_cache_sinks(self) -> int:
        """Number of first tokens whose keys follow the window in position (StreamingLLM); 0: positions stay true."""
        return 0

    @property
    def reinserted(self) -> int:
        """How many of the tokens that a cut drops are put back at the end of the cache: see cache/refresh.py."""
        return 0

    @property
    def recomputed_tokens(self) -> int | None:
        """Without a cache: how many of the last tokens every new one is predicted from; None: all."""
        return None

    @property
    def sinks_and_recent(self) -> int | None:
        """Where the first so many tokens and the most recent ones are all that `score` ever keeps; None: it looks
        at more than positions."""
        return None

    @property
    def heads_alike(self) -> bool:
        """Whether all heads of a layer have the same scores, so that none could keep more than another."""
        return self.sinks_and_recent is not None

    @property
    def per_query_head(self) -> bool:
        """Whether every query head chooses for itself, from keys and values repeated for it (G times the bytes)."""
        return False

    @property
    def moments_from(self) -> int | None:
        """Position from which on queries count for `view.moments`; None: `score` does not ask for them."""
        return None

    @property
    def pages(self) -> Pages | None:
        """What each query after the prompt reads of all that is held: see cache/paged.py; None: everything."""
        return None

    def validate(self) -> None:
        """Raises UserError for settings that make no sense."""

    def check_model(self, facts: ModelFacts) -> None:
        """Raises UserError where the method cannot go with this model."""

    def notes(self) -> dict[str, Any]:
        """What decides answers beside the settings, such as the contents of a file: goes into results and hashes."""
        return {}

    def warnings(self, facts: ModelFacts) -> list[str]:
        """What a user should know before trusting this method on this model."""
        return []


# ---------------------------------------------------------------------------------------------------- discovery


def load(spec: str, settings: Mapping[str, Any] = MappingProxyType({})) -> type[Method]:
    """The class of a bundled method by name, or of the user's own by `path/to/file.py[:Class]`.

    Args:
        settings: all that are given; some methods wrap another, which one of them names.

    Raises:
        UserError: no such method, file or class.
    """
    if ".py" in spec:
        return _load_file(spec).around(settings)
    name = names.check(spec)
    root = __name__.rpartition(".")[0]
    found = importlib.util.find_spec(f"{root}.{name}_") or importlib.util.find_spec(f"{root}.{name}")
    assert found is not None
    return _only_method(importlib.import_module(found.name), name, None).around(settings)


def example(spec: str, slots: int) -> dict[str, Any]:
    """The method's example at `slots` pairs per KV head and layer, as --model_args: see `Method.example`."""
    return {"method": spec, **load(spec).example(slots)}


def _load_file(spec: str) -> type[Method]:
    path_text, _, class_name = spec.partition(".py")
    path = Path(path_text + ".py").expanduser().resolve()
    if not path.is_file():
        raise UserError(f"method={spec}: there is no file {path}. Write method=path/to/file.py:ClassName.")
    module_name = f"kv_lm_eval_user_method_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"method={spec}: {path} could not be imported: {type(error).__name__}: {error}") from error
    method = _only_method(module, path.stem, class_name.lstrip(":") or None)
    method.source = f"{path} sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"
    return method


def _only_method(module: Any, name: str, class_name: str | None) -> type[Method]:
    own = {
        n: c
        for n, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Method) and c is not Method and c.__module__ == module.__name__
    }
    if class_name is not None:
        if class_name not in own:
            raise UserError(
                f"{module.__file__} has no Method class {class_name}{close_names(class_name, own)}: {sorted(own)}"
            )
        own = {class_name: own[class_name]}
    if len(own) != 1:
        raise UserError(f"{module.__file__} must define one subclass of Method, it has {sorted(own) or 'none'}")
    method = next(iter(own.values()))
    method.name = method.__dict__.get("name") or name  # its own: a preset of another method must not take its name
    return method


def levelled(scores: torch.Tensor) -> torch.Tensor:
    """Scores [B, K, N], none negative, of which those of a head that differ by rounding only are the same, so that of
    tokens that are worth the same the older ones stay, whatever their row is computed beside."""
    value, order = scores.sort(dim=-1)
    same = value[..., 1:] - value[..., :-1] <= ROUNDING * value[..., 1:]
    group = F.pad((~same).cumsum(-1), (1, 0))
    least = torch.full_like(value, float("inf")).scatter_reduce(2, group, value, "amin")
    return torch.empty_like(scores).scatter_(2, order, least.gather(2, group))
