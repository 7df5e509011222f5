"""What becomes of the REST: the pairs that were not kept. The treatments beside `drop` are files of `treatments/`.

Shapes: B batch rows, K KV heads, N slots before the cut, M slots after it, D head size.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from kv_lm_eval.cache.store import Kept, rows_of
from kv_lm_eval.cache.transfer import at_least_float32
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.methods.base import Method, View


@dataclass(frozen=True)
class Evicted:
    """Treatment of the evicted pairs: what a layer holds after a cut. Its fields are its settings."""

    evicted: ClassVar[str] = ""  # the name under which `evicted=` asks for it
    forgets: ClassVar[bool] = False  # the pairs that stay are left as they are: those that go need only be hidden

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        """Settings that show the treatment beside a method's example at so many slots; by default its own defaults."""
        return {}

    @property
    def moves_keys(self) -> tuple[str, str] | None:
        """Where keys must be movable in position: the setting that asks for it and one that does not; else None."""
        return None

    def check(self, method: Method) -> None:
        """Raises UserError where the treatment needs what the method does not have."""

    def cut(self, method: Method, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        """The slots that the layer holds from now on.

        Args:
            view: all slots before the cut. scores: [B, 1 or K, N], +inf: always kept.
            counts: [B, 1 or K] slots to keep per row and head, on the host.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Drop(Evicted):
    """Evicted pairs are gone: the treatment of nearly all published methods."""

    evicted: ClassVar[str] = "drop"
    forgets: ClassVar[bool] = True

    def cut(self, method: Method, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        """The slots with the highest scores [B, 1 or K, N], counts [B, 1 or K] of them; M is the most of these."""
        return gather(view, *choose(scores, view.pos, counts))


def available() -> list[str]:
    """Names of the treatments: drop, and every module of `treatments/`."""
    folder = Path(__file__).parent / "treatments"
    return ["drop", *sorted(m.name for m in pkgutil.iter_modules([str(folder)]))]


def load(name: str) -> type[Evicted]:
    """The treatment of that name.

    Raises:
        UserError: there is none.
    """
    if name == "drop":
        return Drop
    if name not in available():
        names = available()
        raise UserError(f"evicted={name} is not one of: {', '.join(names)}{close_names(name, names)}")
    module = importlib.import_module(f"{__name__.rpartition('.')[0]}.treatments.{name}")
    (cls,) = (
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Evicted) and c.__module__ == module.__name__
    )
    cls.evicted = name
    return cls


def needs_weights(method: Method, setting: str, remedy: str) -> None:
    """Raises UserError where a setting reads `method.weights` and the method has none."""
    if type(method).weights is Method.weights:
        raise UserError(f"{setting} the attention that tokens received, which {method.name} does not look at; {remedy}")


def choose(scores: torch.Tensor, pos: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots with the highest scores, in order of position.

    Args:
        scores: [B, 1 or K, N]. pos: [B, 1 or K, N], -1 where empty.
        keep: [B, 1 or K] slots per row and head, on the host.

    Returns:
        index, valid: [B, heads, M] with M = max(keep); rows and heads that keep fewer have their empty entries first.
        Ties go to the older token, so the choice does not depend on the batch, the device or the sort's mood.
    """
    scores = at_least_float32(scores)
    scores = torch.where(pos >= 0, scores.clamp_min(torch.finfo(scores.dtype).min), float("-inf"))
    scores = scores.expand(-1, max(scores.shape[1], keep.shape[1]), -1)  # heads that are scored alike may keep unlike
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., : int(keep.max())]
    rank = torch.arange(order.shape[-1], device=order.device)
    valid = (rank < keep.to(order.device).unsqueeze(-1)).expand_as(order)
    index = torch.where(valid, order, -1).sort(dim=-1).values
    return index.clamp_min(0), index >= 0


def gather(view: View, index: torch.Tensor, valid: torch.Tensor) -> Kept:
    """The slots of a view at index [B, 1 or K, M]; entries that are not valid become empty."""
    heads = max(view.pos.shape[1], index.shape[1])
    pos = view.pos.expand(-1, heads, -1).gather(2, index.expand(-1, heads, -1))
    pos = torch.where(valid.expand(-1, heads, -1), pos, -1)
    mass = None if view._mass is None else view._mass.gather(2, index.expand(-1, view.keys.shape[1], -1))
    return Kept(rows_of(view.keys, index), rows_of(view.values, index), pos, mass, slots=index)


def split(view: View, index: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots stay and which are evicted, [B, K, N] bool each; empty ones are neither."""
    b, k, n, _ = view.keys.shape
    index, valid = index.expand(b, k, -1), valid.expand(b, k, -1)
    stays = torch.zeros(b, k, n, dtype=torch.int32, device=index.device).scatter_add_(2, index, valid.int()) > 0
    return stays, (view.pos >= 0) & ~stays
