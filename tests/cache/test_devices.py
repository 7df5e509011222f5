"""Apple's GPUs have no float64: no method and no treatment makes a tensor of it where sums are told to be narrower."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import tiny
import torch
from on_device import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kv_lm_eval.cache.transfer import sum_dtype
from kv_lm_eval.methods import base, evicted

BUDGET = 16
SETTINGS = {name: base.example(name, BUDGET) for name in base.available() if base.load(name).uses_cache}
SETTINGS |= {
    f"{name} of evicted": {"method": "h2o", "max_capacity_prompt": BUDGET, "compress_every": 4, "evicted": name}
    for name in evicted.available()
}
SETTINGS["compensate before RoPE"] = {**SETTINGS["snapkv_comp"], "key_space": "pre_rope", "block_size": 4}


class NoFloat64(TorchDispatchMode):
    """Refuses what such a device cannot hold."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{function} made a float64 tensor")
        return out


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's kernel for float32 on CUDA cannot be called under such a look")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_float64_where_there_is_none(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pair, rows = tiny.pair("llama"), [tiny.tokens(40), tiny.tokens(27, seed=1)]
    exact = tiny.forward(pair.model, pair.cache(**settings), rows)
    original = sum_dtype  # this module's own name for it is replaced on the way
    for module in list(sys.modules.values()):
        if module.__dict__.get("sum_dtype") is original:
            monkeypatch.setattr(module, "sum_dtype", lambda device: torch.float32)
    cache, full = pair.cache(**settings), pair.cache(**settings)
    with NoFloat64():
        first = tiny.forward(pair.model, cache, rows)
        for step in range(6):
            tiny.forward(pair.model, cache, [[5 + step], [7 + step]], [40 + step, 27 + step])
    torch.testing.assert_close(first, exact)
    monkeypatch.undo()
    tiny.forward(pair.model, full, rows)
    for step in range(6):
        tiny.forward(pair.model, full, [[5 + step], [7 + step]], [40 + step, 27 + step])
    for layer in range(2):
        assert tiny.kept(cache, layer) == tiny.kept(full, layer)


def test_the_type_of_sums() -> None:
    assert sum_dtype(torch.device("mps")) == torch.float32
    assert sum_dtype("cpu") == sum_dtype("cuda") == torch.float64
