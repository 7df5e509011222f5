from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kv_lm_eval.cache.transfer import at_least_float32, sum_dtype
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import Method, View, setting

if TYPE_CHECKING:
    from kv_lm_eval.cache.facts import ModelFacts

NAME = "q_filters"


class QFilter(Method):
    """Keys that point where queries do stay: one direction for each KV head, that in which its queries are strongest.

    The directions come from a file (filters=FILE.safetensors, as the authors publish them for a model: one tensor
    q_filters [layers, KV heads, head size]); the keys with the smallest product stay, since the published ones point
    away from the queries. Without a file they are made of the prompt's own queries by the same recipe: the first right
    singular vector of each query head's queries, turned to the side on which these are, averaged over the group; keys
    with the largest product stay then.

    Paper: arXiv:2503.02812 (Q-Filters), section 3. Reference: NVIDIA/kvpress, presses/qfilter_press.py.
    Deviations: none with a file. Without one the prompt takes the place of the calibration texts, and its queries are
    held until the cut; later cuts go by the queries since the last one and as many as window_size before.
    """

    paper = "arXiv:2503.02812"
    every_query = True

    filters: str | None = setting(
        None, "file of the directions, made for this model; None: by the prompt's own queries"
    )
    window_size: int = setting(128, "without a file: queries before a cut that the next one goes by too")

    def validate(self) -> None:
        if self.window_size < 1:
            raise UserError(f"window_size={self.window_size}: at least one query has a direction")
        if self.filters is not None:
            assert self._filters.dim() == 3

    @cached_property
    def _filters(self) -> Tensor:
        """[layers, K, D] of the file.

        Raises:
            UserError: it is not such a file.
        """
        path = Path(str(self.filters)).expanduser()
        if not path.is_file():
            raise UserError(
                f"filters={self.filters}: there is no such file; give the model.safetensors of the directions"
            )
        try:
            found = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"filters={self.filters} is no safetensors file: {error}") from None
        tensor = found.get(NAME)
        if tensor is None or tensor.dim() != 3 or not tensor.is_floating_point() or not tensor.isfinite().all():
            holds = ", ".join(f"{name} {list(x.shape)}" for name, x in sorted(found.items())[:4]) or "nothing"
            raise UserError(
                f"filters={self.filters} must hold one tensor {NAME} of finite numbers, [layers, KV heads, head size]; "
                f"it holds {holds}"
            )
        return tensor

    def check_model(self, facts: ModelFacts) -> None:
        if self.filters is None:
            return
        layers, heads, _ = self._filters.shape
        wanted = {kv_heads for _, kv_heads in facts.heads.values()}
        if layers != facts.num_layers or wanted - {heads}:
            raise UserError(
                f"filters={self.filters} are of {layers} layers with {heads} KV heads, the model has "
                f"{facts.num_layers} with {', '.join(map(str, sorted(wanted)))}: they were made for another model"
            )

    def notes(self) -> dict[str, Any]:
        if self.filters is None:
            return {}
        data = Path(self.filters).expanduser().read_bytes()
        return {"filters_sha256": hashlib.sha256(data).hexdigest()}

    @property
    def num_queries(self) -> int:
        return self.window_size

    def score(self, view: View) -> Tensor:
        """[B, K, N]: the product of each key with its head's direction."""
        keys = at_least_float32(view.keys)
        if self.filters is None:
            return (keys * self._own(view).unsqueeze(2)).sum(-1)
        direction = self._filters[view.layer].to(keys.device, keys.dtype)
        if direction.shape[-1] != keys.shape[-1]:
            raise UserError(
                f"filters={self.filters} have {direction.shape[-1]} numbers a head, the keys of the model "
                f"{keys.shape[-1]}: they were made for another model"
            )
        return -(keys * direction[:, None]).sum(-1)

    def _own(self, view: View) -> Tensor:
        """[B, K, D]: the strongest direction of the queries that are held, mean over the group."""
        queries = at_least_float32(view.queries()[0])  # [B, K, G, q, D]
        gram = (queries.transpose(3, 4) @ queries).to(sum_dtype(queries.device))
        strongest = torch.linalg.eigh(gram).eigenvectors[..., -1].to(queries.dtype)  # [B, K, G, D]
        side = (queries.sum(3) * strongest).sum(-1, keepdim=True).sign()
        return (strongest * side).mean(2)
