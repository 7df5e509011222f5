from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts

CONFIG, WEIGHTS = "config.json", "model.safetensors"
UNTRAINED = "untrained"


class KVzap(Method):
    """A small trained model says from a token's hidden state how KVzip+ would score its pair: no second reading.

    surrogate=DIR names the folder of one that was trained for this model, as its authors publish it (nvidia/KVzap-...):
    config.json with input_dim, output_dim, n_modules and hidden_dim (null: linear), and model.safetensors with
    layers.I.weight and .bias, or layers.I.0 and layers.I.2 with a GELU between them. It gives the logarithm of a score
    for each KV head from what the layer's queries, keys and values are made of. Meant for a threshold in that unit:
    threshold=-4 drops what scores less, but for the newest threshold_recent=128 tokens; compress_every goes on with it
    in the answer. Each token is scored once, when it comes, and no hidden state is kept. surrogate=untrained takes
    made-up weights of the model's shapes instead, to try the parts: a random choice.

    Paper: arXiv:2601.07891. Reference: NVIDIA/kvpress, presses/kvzap_press.py and dms_press.py.
    Deviations: none known. The published weights could not be had here: reading them is tested on made-up weights of
    their names and shapes.
    """

    paper = "arXiv:2601.07891"
    reads_hidden = True
    needs_training = True
    slotwise = True

    surrogate: str | None = setting(None, f"folder of the weights, trained for this model; {UNTRAINED}: made-up ones")

    @classmethod
    def example(cls, slots: int) -> dict[str, Any]:
        return {**super().example(slots), "surrogate": UNTRAINED}

    def validate(self) -> None:
        if self.surrogate is None:
            raise UserError(
                f"method=kvzap scores by a small model that was trained for this one: surrogate=DIR, a folder with "
                f"{CONFIG} and {WEIGHTS} (nvidia/KVzap-mlp-...); surrogate={UNTRAINED} takes made-up weights, a random "
                "choice; method=kvzip needs none, and reads the prompt twice"
            )
        if self.surrogate != UNTRAINED:
            assert self._trained.shape["n_modules"] > 0

    @cached_property
    def _trained(self) -> Trained:
        return _read(Path(str(self.surrogate)).expanduser(), str(self.surrogate))

    def check_model(self, facts: ModelFacts) -> None:
        if self.surrogate == UNTRAINED:
            return
        shape, heads = self._trained.shape, {kv_heads for _, kv_heads in facts.heads.values()}
        if shape["n_modules"] != facts.num_layers or heads - {shape["output_dim"]}:
            raise UserError(
                f"surrogate={self.surrogate} is of {shape['n_modules']} layers with {shape['output_dim']} KV heads, "
                f"the model has {facts.num_layers} with {', '.join(map(str, sorted(heads)))}: it is another's"
            )

    def notes(self) -> dict[str, Any]:
        if self.surrogate in (None, UNTRAINED):
            return {}
        data = (Path(str(self.surrogate)).expanduser() / WEIGHTS).read_bytes()
        return {"surrogate_sha256": hashlib.sha256(data).hexdigest()}

    def warnings(self, facts: ModelFacts) -> list[str]:
        if self.surrogate != UNTRAINED:
            return []
        return [f"surrogate={UNTRAINED}: tokens are scored by made-up weights, which is a random choice and not KVzap"]

    def note(self, view: View) -> Tensor:
        """[B, K, q]: the scores of the new tokens, logarithms."""
        hidden, heads = view.hidden, view.keys.shape[1]
        parts = (
            self._untrained(hidden, view.layer, heads) if self.surrogate == UNTRAINED else self._of(hidden, view.layer)
        )
        first, *rest = parts
        out = F.linear(hidden, *first)
        for part in rest:
            out = F.linear(F.gelu(out), *part)
        return out.transpose(1, 2)

    def _of(self, hidden: Tensor, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Weight [out, in] and bias [out] of the layer's maps, in the format and on the device of hidden [B, q, M]."""
        if hidden.shape[-1] != (width := self._trained.shape["input_dim"]):
            raise UserError(
                f"surrogate={self.surrogate} takes hidden states of {width} numbers, the model's have "
                f"{hidden.shape[-1]}: it was trained for another model"
            )
        key = layer, hidden.dtype, hidden.device
        if key not in self._moved:
            self._moved[key] = [(w.to(hidden), b.to(hidden)) for w, b in self._trained.layers[layer]]
        return self._moved[key]

    @cached_property
    def _moved(self) -> dict[tuple[int, torch.dtype, torch.device], list[tuple[Tensor, Tensor]]]:
        return {}

    def _untrained(self, hidden: Tensor, layer: int, heads: int) -> list[tuple[Tensor, Tensor]]:
        """The same of a linear surrogate that nobody trained."""
        random, width = torch.Generator().manual_seed(layer), hidden.shape[-1]
        weight = torch.randn(heads, width, generator=random) / width**0.5
        return [(weight.to(hidden), hidden.new_zeros(heads))]

    def score(self, view: View) -> Tensor:
        """[B, K, N]: what was noted of each token when it came."""
        assert view.remembered is not None
        return view.remembered


class Shape(TypedDict):
    """Numbers of a hidden state, KV heads, layers, and numbers between the two maps of a layer; None: it has one."""

    input_dim: int
    output_dim: int
    n_modules: int
    hidden_dim: NotRequired[int | None]


class Trained(NamedTuple):
    """A surrogate: its shape and, by layer, weight [out, in] and bias [out] of its one map or its two."""

    shape: Shape
    layers: list[list[tuple[Tensor, Tensor]]]


def _read(folder: Path, said: str) -> Trained:
    """The surrogate in a folder.

    Raises:
        UserError: there is none, or not of this form.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"surrogate={said}: there is no file {folder / name}; give the folder of a KVzap model")
    shape: Shape = files.read_json(folder / CONFIG, Shape)
    try:
        found = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"surrogate={said}: {WEIGHTS} is no safetensors file: {error}") from None
    between = shape.get("hidden_dim")
    sizes = [(shape["input_dim"], shape["output_dim"])]
    if between is not None:
        sizes = [(shape["input_dim"], between), (between, shape["output_dim"])]
    names = [""] if between is None else ["0.", "2."]  # a GELU is module 1
    layers = []
    for layer in range(shape["n_modules"]):
        maps = []
        for part, (inputs, outputs) in zip(names, sizes, strict=True):
            root = f"layers.{layer}.{part}"
            weight = _tensor(found, root + "weight", (outputs, inputs), said)
            maps.append((weight, _tensor(found, root + "bias", (outputs,), said)))
        layers.append(maps)
    return Trained(shape, layers)


def _tensor(found: dict[str, Tensor], name: str, wanted: tuple[int, ...], said: str) -> Tensor:
    """The tensor of that name and shape."""
    tensor = found.get(name)
    if tensor is None or tensor.shape != wanted or not tensor.is_floating_point():
        holds = "is not there" if tensor is None else f"is {list(tensor.shape)} of {tensor.dtype}"
        raise UserError(f"surrogate={said}: {name} should be {list(wanted)} by {CONFIG}, and {holds} in {WEIGHTS}")
    if not tensor.isfinite().all():
        raise UserError(f"surrogate={said}: {name} has numbers that are not finite, so that scores would be NaN")
    return tensor
