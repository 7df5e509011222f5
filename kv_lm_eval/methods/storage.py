"""IN WHAT FORM the pairs that stay are held: as the model made them, or in one of the files of `storages/`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from kv_lm_eval.cache.coded import Codec
from kv_lm_eval.errors import UserError, close_names

KEY = "kv_cache_dtype"  # the setting that names a form, as in vLLM


def residual(default: int) -> int:
    """The field that every form has."""
    about = "newest pairs per KV head that stay in the model's number format"
    return field(default=default, metadata={"help": f"{KEY} or nbits: {about}"})


def coding(default: int) -> int:
    """The field of forms in which every pair is coded for itself."""
    about = "pairs that wait until so many tokens more have been seen, and are coded together"
    return field(default=default, metadata={"help": f"{KEY}: {about}"})


@dataclass(frozen=True)
class Storage:
    """All pairs are in the model's own number format.

    A subclass holds the older ones in fewer bits: it says how keys and values are coded, and its fields are settings.
    It is one file of `storages/`, whose name is the form's.
    """

    name: ClassVar[str] = "auto"
    asked_by: ClassVar[tuple[str, ...]] = ()  # settings that ask for the form without its name
    does: ClassVar[str] = "quantises"  # to pairs, in a word
    variants: ClassVar[dict[str, dict[str, Any]]] = {}  # other names that stand for the form and some of its settings

    residual_length: int = residual(0)

    def __post_init__(self) -> None:
        if self.residual_length < 0:
            raise UserError(f"residual_length={self.residual_length} is negative; it counts pairs, 0 or more")

    @classmethod
    def example(cls) -> dict[str, Any]:
        """Settings that show the form on prompts of a few hundred tokens: the tables of the docs take them."""
        return {KEY: cls.name}

    @property
    def quantises(self) -> bool:
        return False

    @property
    def words(self) -> str:
        """The setting that asks for the form, for messages."""
        return f"{KEY}={self.name}"

    @property
    def step(self) -> int:
        """Pairs that change their form together."""
        return 1

    @property
    def waits(self) -> str:
        """The setting that says after how many tokens the first pairs change their form, for messages."""
        return f"{KEY}={self.name}"

    @property
    def keys(self) -> Codec:
        """How keys are coded."""
        raise NotImplementedError(f"{KEY}={self.name} codes nothing")

    @property
    def values(self) -> Codec:
        """How values are coded."""
        raise NotImplementedError(f"{KEY}={self.name} codes nothing")

    def check(self, size: int) -> None:
        """Raises UserError where keys of so many numbers each cannot be held so."""

    @property
    def watches(self) -> int:
        """Last queries that `of_queries` is given; 0: keys are coded by themselves."""
        return 0

    def of_queries(self, keys: torch.Tensor, real: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
        """What all keys of a head are coded by, [B, K, ...] by name: chosen once, when the first might be coded, from
        all keys [B, K, N, D] that are real [B, K, N] and the last queries [B, H, W, D]."""
        raise NotImplementedError(f"{KEY}={self.name} watches no queries")

    def due(self, before: int, after: int) -> bool:
        """Whether a row that has now seen `after` tokens, `before` of them until its last forward, codes the pairs that
        wait: a clock of the row's own, the same whatever batch or segment its tokens come in."""
        return before // self.step < after // self.step

    def until_due(self, seen: int) -> int:
        """Tokens that a row may be fed in one forward so that it ends where the next pairs are coded."""
        return self.step - seen % self.step

    def settings(self) -> dict[str, Any]:
        """All that was set or stands by default, by the names of --model_args."""
        named = {} if self.asked_by else {KEY: self.name}
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**named, **{name: value for name, value in own.items() if value is not None}}


@dataclass(frozen=True)
class PairByPair(Storage):
    """A form in which every pair is coded for itself."""

    code_every: int = coding(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.code_every < 1:
            raise UserError(f"code_every={self.code_every} must be at least 1: it counts tokens from coding to coding")

    @property
    def quantises(self) -> bool:
        return True

    @property
    def step(self) -> int:
        return self.code_every

    @property
    def waits(self) -> str:
        return f"code_every={self.code_every}"

    def due(self, before: int, after: int) -> bool:
        return before // self.code_every < after // self.code_every

    def until_due(self, seen: int) -> int:
        return self.code_every - seen % self.code_every


@dataclass(frozen=True)
class Calibrated(PairByPair):
    """A form in which all pairs of a head are coded by something that its first pairs decide."""

    calibration_tokens: int = field(
        default=128,
        metadata={"help": f"{KEY}: tokens seen before what a head's pairs share is fixed, and the first pair coded"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_tokens < 1:
            raise UserError(
                f"calibration_tokens={self.calibration_tokens} must be at least 1: what pairs share is some token's"
            )

    @property
    def first(self) -> int:
        """Tokens that must have been seen before anything is coded."""
        return self.calibration_tokens

    @property
    def waits(self) -> str:
        return f"calibration_tokens={self.calibration_tokens}" if self.first > self.code_every else super().waits

    def due(self, before: int, after: int) -> bool:
        return after >= self.first and (before < self.first or super().due(before, after))

    def until_due(self, seen: int) -> int:
        return self.first - seen if seen < self.first else super().until_due(seen)


class Apart:
    """What most codes do not have, for `Codec`: tables of their own, and numbers that all pairs of a head share."""

    def tables(self, size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """None [...] are needed."""
        return ()

    def of_head(
        self, x: torch.Tensor, real: torch.Tensor, before: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Nothing, of pairs x [B, K, n, D] that are real [B, K, n]."""
        return {}


def available() -> list[str]:
    """Names of the forms: auto, and every module of `storages/`."""
    folder = Path(__file__).parent / "storages"
    return [Storage.name, *sorted(m.name for m in pkgutil.iter_modules([str(folder)]))]


def load(name: str) -> type[Storage]:
    """The form that a file of `storages/` defines, or the plain one."""
    if name == Storage.name:
        return Storage
    module = importlib.import_module(f"{__name__.rpartition('.')[0]}.storages.{name}")
    (cls,) = (
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Storage) and c.__module__ == module.__name__
    )
    cls.name = name
    return cls


def names() -> dict[str, tuple[type[Storage], dict[str, Any]]]:
    """All that `kv_cache_dtype` may be: the form, and the settings that the name stands for."""
    out: dict[str, tuple[type[Storage], dict[str, Any]]] = {}
    for name in available():
        cls = load(name)
        out |= {name: (cls, {}), **{variant: (cls, settings) for variant, settings in cls.variants.items()}}
    return out


def chosen(values: Mapping[str, Any]) -> tuple[type[Storage], dict[str, Any]]:
    """The form that the settings ask for, by its name or by what only it understands, and its settings.

    Raises:
        UserError: there is none of that name, or it stands for another setting than the one given.
    """
    name = str(values.get(KEY, Storage.name)).lower()
    known = names()
    if name not in known:
        raise UserError(f"{KEY}={values[KEY]} is not one of: {', '.join(known)}{close_names(name, known)}")
    cls, stands_for = known[name]
    for key, value in stands_for.items():
        if key in values and str(values[key]) != str(value):
            raise UserError(f"{KEY}={name} stands for {key}={value}, and {key}={values[key]} is given; leave one out")
    if cls is Storage:
        asked = [c for c, _ in known.values() if any(key in values for key in c.asked_by)]
        cls = asked[0] if asked else Storage
    return cls, {**values, **stands_for}
