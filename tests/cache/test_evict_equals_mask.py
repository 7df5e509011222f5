"""Evicting equals masking: after a cut, logits are those of the stock model in which the evicted positions are hidden.

The oracle is the stock model with its eager attention over the whole sequence, and a mask of its own for every layer
and head. Logits are of the order of 10, in float32, so 1e-4 is allowed; hiding nothing gives differences over 0.1.
"""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as tf

from kv_lm_eval.methods import base

LENGTHS = (100, 61, 33)  # over 87 slots, the stores of sliding layers drop what can never be seen again
CHUNKS = (1, 5, 20)
BUDGET = 20


def drops(cls: type[base.Method]) -> bool:
    """Whether what a method evicts is gone and what stays is as it was, on every model."""
    return tiny.chooses(cls) and "evicted" not in cls.presets and not tiny.moves(cls.name)


METHODS = {
    **{name: tiny.free(name, BUDGET, compress_every=0) for name in tiny.methods(drops)},
    "snapkv avg": {"method": "snapkv", "window_size": 6, "pooling": "avg", "max_capacity_prompt": BUDGET},
    "pyramid, ada and a skipped layer": {
        "method": "knorm",
        "max_capacity_prompt": BUDGET,
        "layer_budget": "pyramid",
        "head_budget": "ada",
        "skip_layers": "0",
    },
}


@pytest.fixture(scope="module", params=[*tiny.CORE, "gemma2"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def eager_twin(name: str) -> tf.PreTrainedModel:
    stock = tiny.build(name)
    stock.set_attn_implementation("eager")
    return stock


def own_window(config: tf.PretrainedConfig, layer: int) -> int | None:
    """The sliding window that the architecture itself gives to a layer."""
    if config.model_type == "mistral":
        return config.sliding_window
    types = getattr(config, "layer_types", None)
    return config.sliding_window if types and types[layer] == "sliding_attention" else None


@torch.inference_mode()
def masked_logits(stock: tf.PreTrainedModel, row: list[int], cut: int, kept: list[list[list[int]]]) -> torch.Tensor:
    """Stock logits [n, V]; tokens from `cut` on see, of the positions before it, only kept[layer][KV head]."""
    n, heads = len(row), stock.config.num_attention_heads
    index = torch.arange(n)
    attentions = [m for m in stock.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]
    handles = []
    for module in attentions:
        layer = module.layer_idx
        hidden = torch.zeros(heads, n, n, dtype=torch.bool)
        for head in range(heads):
            stays = set(kept[layer][head * len(kept[layer]) // heads])
            gone = [p for p in range(cut) if p not in stays]
            hidden[head, cut:, gone] = True
        hidden |= index[None, :] > index[:, None]
        if (window := own_window(stock.config, layer)) is not None:
            hidden |= index[:, None] - index[None, :] >= window
        mask = torch.zeros(1, heads, n, n, dtype=stock.dtype).masked_fill(hidden, torch.finfo(torch.float32).min)
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
            )
        )
    try:
        return stock(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_chunks_after_a_cut_see_exactly_what_was_kept(name: str, method: str) -> None:
    pair, stock = tiny.pair(name), eager_twin(name)
    rows = [tiny.tokens(n + sum(CHUNKS), seed=n) for n in LENGTHS]
    cache = pair.cache(**METHODS[method])
    tiny.forward(pair.model, cache, [r[:n] for r, n in zip(rows, LENGTHS, strict=True)])
    layers = range(pair.facts.num_layers)
    kept = [[tiny.kept(cache, layer, b) for layer in layers] for b in range(len(rows))]
    got, done = [], 0
    for chunk in CHUNKS:
        part = [r[n + done : n + done + chunk] for r, n in zip(rows, LENGTHS, strict=True)]
        got.append(tiny.forward(pair.model, cache, part, starts=[n + done for n in LENGTHS]))
        done += chunk
    for b, (row, n) in enumerate(zip(rows, LENGTHS, strict=True)):
        compression = tiny.compression(**METHODS[method])
        if not (compression.layers.differ or compression.heads.differ):
            cut = [layer for layer in layers if pair.facts.compressible(layer)]
            assert all(len(head) == BUDGET for layer in cut for head in kept[b][layer])
        hidden = masked_logits(stock, row, n, kept[b])[n:]
        unmasked = masked_logits(stock, row, n, [[list(range(n))]] * len(layers))[n:]
        logits = torch.cat([g[b] for g in got])
        assert (logits - hidden).abs().max() <= 1e-4, f"row of {n} tokens"
        if pair.facts.all_sliding and compression.method.sinks_and_recent is not None:
            continue  # a window of 20 within the model's own of 24
        assert (logits - unmasked).abs().max() > 0.1, "the comparison would not notice a wrong mask"


@pytest.mark.parametrize("method", METHODS)
def test_values_stay_with_their_keys(name: str, method: str) -> None:
    pair = tiny.pair(name)
    full, cut = pair.cache(method="full"), pair.cache(**METHODS[method])
    row = tiny.tokens(60)
    for cache in (full, cut):
        tiny.forward(pair.model, cache, [row])
    for layer, (all_slots, slots) in enumerate(zip(full.stores, cut.stores, strict=True)):
        for head in range(slots.keys.shape[1]):
            positions = slots.pos[0, head if slots.pos.shape[1] > 1 else 0].long()
            where = {p: i for i, p in enumerate(all_slots.pos[0, 0].tolist())}
            real = positions >= 0  # heads that keep fewer have empty slots first
            index = [where[p] for p in positions[real].tolist()]
            # To the bit, but for methods that count attention: their outputs come from the weights that are counted
            for kind in ("keys", "values"):
                held, same = getattr(slots, kind)[0, head, real], getattr(all_slots, kind)[0, head, index]
                off = 1e-5 if cut.compression.method.accumulates and layer else 0
                assert (held - same).abs().max() <= off, f"{kind} of layer {layer}"
