"""The face that our caches turn to transformers: all that transformers asks of a cache, in one place.

transformers' models and generate() look at `cache.layers` as well as at the cache itself (are all layers linear? is any
of them sliding? can they be cropped?). So a face has as many layers as the model, each a layer of attention that grows
without end; what they hold is ours and not to be found in them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kv_lm_eval.cache.attention import Step
from kv_lm_eval.cache.facts import ModelFacts


class _Layer(CacheLayerMixin):
    """One layer as transformers sees it."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: Face, index: int) -> None:
        super().__init__()
        self._cache, self._index = weakref.ref(cache), index

    def _whole(self) -> Face:
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is set aside beforehand."""

    def update(self, key_states, value_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        return self._whole().update(key_states, value_states, self._index, *args, **kwargs)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._whole().get_mask_sizes(query_length, self._index)

    def get_seq_length(self, *args: Any) -> int:
        return self._whole().get_seq_length(self._index)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions


class Face(Cache):
    """A cache whose pairs are our own: `update` only tags the new keys and lets them through to our attention function.

    A subclass says how many tokens it has seen (`get_seq_length`), which is never the number of its slots, and what the
    new tokens of a layer are to see (`attend`).
    """

    def __init__(self, facts: ModelFacts) -> None:
        super().__init__(layers=[_Layer(self, i) for i in range(facts.num_layers)])
        self.facts = facts

    def attend(self, step: Step, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of one layer's new tokens, [B, q, H, D]; mask [B, >= q]: 0 where a token is padding, or None."""
        raise NotImplementedError

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        keys = key_states.view_as(key_states)
        keys._kv_tag = (self, layer_idx)
        return keys, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @property
    def is_compileable(self) -> bool:
        return False  # transformers' own way of compiling is not meant

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    def crop(self, *args: Any) -> None:
        raise NotImplementedError(
            "a compressed cache cannot be cropped: evicted tokens are gone (no assisted decoding)"
        )

    def reset(self) -> None:
        raise NotImplementedError("a compressed cache is made anew for every batch, not reset")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows at the indices [B], in their place."""
        raise NotImplementedError(f"{type(self).__name__} cannot reorder its rows")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Rows at the indices [B]."""
        self.reorder_cache(indices)
