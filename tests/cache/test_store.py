"""What is stored: bytes counted by hand, no storage kept alive in secret, forks and reorderings that carry all."""

from __future__ import annotations

import gc
import weakref

import pytest
import tiny
import torch

from kv_lm_eval.cache.store import MIN_HEADROOM, Kept, LayerStore
from kv_lm_eval.methods.evicted import choose

OBSERVING = {"method": "snapkv", "window_size": 5, "max_capacity_prompt": 12, "compress_every": 4}
ACCUMULATING = {"method": "h2o", "max_capacity_prompt": 12, "compress_every": 4}
IN_CACHE = {"method": "streaming_llm", "n_sink": 2, "window_size": 10}
STATE = ("keys", "values", "pos", "mass", "queries", "query_pos", "pristine_sinks")


def state(store: LayerStore) -> dict[str, torch.Tensor]:
    return {name: getattr(store, name).clone() for name in STATE if getattr(store, name) is not None}


def filled(length: int, kv_heads: int = 2, size: int = 8, batch: int = 1) -> LayerStore:
    store = LayerStore()
    keys = torch.arange(length).float().view(1, 1, -1, 1).expand(batch, kv_heads, -1, size).clone()
    store.append(keys, -keys, torch.arange(length).expand(batch, -1))
    return store


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_of_keys_and_values_are_those_counted_by_hand(dtype: torch.dtype, element: int) -> None:
    store = LayerStore()
    store.append(torch.zeros(3, 2, 10, 8, dtype=dtype), torch.zeros(3, 2, 10, 4, dtype=dtype), torch.zeros(3, 10))
    assert store.bytes_per_slot == (8 + 4) * element
    assert store.allocated_bytes == 3 * 2 * 10 * (8 + 4) * element
    assert store.overhead_bytes == 3 * 10 * 4, "positions in 32 bits"


def test_valid_bytes_are_those_of_kept_tokens_and_allocated_bytes_those_of_the_storage() -> None:
    pair = tiny.pair("llama")
    cache = pair.cache(method="knorm", max_capacity_prompt=12)
    tiny.forward(pair.model, cache, [tiny.tokens(200), tiny.tokens(7)])
    slot = 2 * 8 * 4  # key and value, head size 8, float32
    numbers = cache.snapshot()
    assert numbers["kv_bytes_valid"] == [2 * 2 * 12 * slot, 2 * 2 * 7 * slot]  # layers, KV heads, slots
    held = sum(
        s._keys.untyped_storage().nbytes() + s._values.untyped_storage().nbytes()
        for part in cache.segments
        for s in part.stores
    )
    assert numbers["kv_bytes_allocated"] == held / 2
    assert held <= 2 * 2 * 2 * (12 + MIN_HEADROOM) * slot, "the prompt's storage is given back"


def test_overhead_is_all_that_is_held_beside_keys_and_values() -> None:
    pair = tiny.pair("llama")
    for settings in (OBSERVING, ACCUMULATING, IN_CACHE):
        cache = pair.cache(**settings)
        tiny.forward(pair.model, cache, [tiny.tokens(30)])
        for store in cache.stores:
            tensors = [t for t in vars(store).values() if isinstance(t, torch.Tensor)]
            total = sum(t.numel() * t.element_size() for t in tensors)
            assert store.overhead_bytes == total - store.allocated_bytes


@pytest.mark.parametrize("name", tiny.CORE)
def test_no_store_keeps_a_larger_tensor_alive(name: str) -> None:
    pair = tiny.pair(name)
    cache = pair.cache(method="full")
    tiny.forward(pair.model, cache, [tiny.tokens(100)])
    for store in cache.stores:
        for tensor in (store._keys, store._values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("settings", [{"method": "full"}, OBSERVING, ACCUMULATING, IN_CACHE], ids=lambda s: s["method"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_cache_that_is_no_longer_used_is_freed_at_once(name: str, settings: dict[str, object]) -> None:
    """Not at the next garbage collection: on a GPU two caches would be held at a time."""
    pair = tiny.pair(name)
    cache = pair.cache(**settings)
    tiny.forward(pair.model, cache, [tiny.tokens(30)])
    tiny.forward(pair.model, cache, [[1]], starts=[30])
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()


def test_a_far_off_next_cut_reserves_no_storage_for_the_whole_way() -> None:
    pair = tiny.pair("llama")
    cache = pair.cache(method="knorm", max_capacity_prompt=12, compress_every=20_000)
    tiny.forward(pair.model, cache, [tiny.tokens(30)])
    assert max(store._keys.shape[2] for store in cache.stores) <= 2048


# --- slots ----------------------------------------------------------------------------------------------------------


def test_appending_token_by_token_keeps_what_was_there() -> None:
    store = filled(3)
    for t in range(3, 300):
        store.append(torch.full((1, 2, 1, 8), float(t)), torch.full((1, 2, 1, 8), -float(t)), torch.tensor([[t]]))
    assert store.pos[0, 0].tolist() == list(range(300))
    assert torch.equal(store.keys[0, 1, :, 3], torch.arange(300.0)) and torch.equal(store.values, -store.keys)


def test_kept_slots_are_in_order_and_rows_with_fewer_have_their_empty_ones_first() -> None:
    scores = torch.tensor([[[5.0, 1, 4, 2, 3]], [[0.0, 0, 9, 8, 7]]])
    pos = torch.tensor([[[0, 1, 2, 3, 4]], [[-1, -1, 0, 1, 2]]])
    index, valid = choose(scores, pos, torch.tensor([[3], [2]]))
    assert index[0, 0].tolist() == [0, 2, 4] and valid[0, 0].all()
    assert valid[1, 0].tolist() == [False, True, True] and index[1, 0, 1:].tolist() == [2, 3]


def test_ties_go_to_the_older_token_and_empty_slots_are_never_chosen() -> None:
    pos = torch.tensor([[[-1, -1, *range(30)]]])
    scores = torch.zeros(1, 1, 32)
    assert choose(scores, pos, torch.tensor([[7]]))[0].tolist() == [[list(range(2, 9))]]
    scores[..., 2:] = float("-inf")
    assert choose(scores, pos, torch.tensor([[7]]))[0].tolist() == [[list(range(2, 9))]], (
        "even where all scores are minus infinity"
    )


def test_each_head_keeps_its_own_slots_with_their_positions_and_mass() -> None:
    store = filled(6)
    store.add_mass(torch.arange(12).float().view(1, 2, 6))
    index = torch.tensor([[[0, 2, 5], [1, 3, 4]]])
    keys = store.keys.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 8))
    pos = store.pos.expand(-1, 2, -1).gather(2, index)
    store.replace(Kept(keys, -keys, pos, store.mass.gather(2, index)), room=1)
    assert store.pos.tolist() == [[[0, 2, 5], [1, 3, 4]]]
    assert store.mass.tolist() == [[[0, 2, 5], [7, 9, 10]]]
    store.append(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), torch.tensor([[6]]))
    assert store.pos[0, :, -1].tolist() == [6, 6] and store.mass[0, :, -1].tolist() == [0, 0]


# --- forks and reorderings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [OBSERVING, ACCUMULATING, IN_CACHE], ids=lambda s: s["method"])
def test_a_fork_goes_its_own_way_and_its_origin_notices_nothing(settings: dict[str, object]) -> None:
    pair = tiny.pair("llama")
    cache = pair.cache(**settings)
    tiny.forward(pair.model, cache, [tiny.tokens(30, seed=1), tiny.tokens(20, seed=2)])
    before = [state(store) for segment in cache.segments for store in segment.stores]
    fork = cache.select([1, 0, 1])
    for i in range(9):
        tiny.forward(pair.model, fork, [[i], [i + 1], [i + 2]], starts=[20 + i, 30 + i, 20 + i])
    assert (fork.seen, cache.seen) == ([29, 39, 29], [30, 20])
    assert ({s.decoded for s in fork.segments}, {s.decoded for s in cache.segments}) == ({9}, {0})
    stores = [store for segment in cache.segments for store in segment.stores]
    for store, old in zip(stores, before, strict=True):
        assert state(store).keys() == old.keys()
        assert all(torch.equal(now, old[name]) for name, now in state(store).items())


@pytest.mark.parametrize("settings", [OBSERVING, ACCUMULATING, IN_CACHE], ids=lambda s: s["method"])
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
def test_reordering_moves_everything_that_belongs_to_a_row(settings: dict[str, object], how: str) -> None:
    pair, rows, order = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in (30, 20, 25)], [2, 0, 0]
    cache = pair.cache(**settings)
    tiny.forward(pair.model, cache, rows)
    before = [[state(store) for store in cache.of_row(row)[0].stores] for row in range(3)]
    expected = {"method": {"queries", "query_pos"} if settings is OBSERVING else {"mass"}}["method"]
    if settings is not IN_CACHE:
        assert expected <= before[0][0].keys()
    getattr(cache, how)(torch.tensor(order))
    assert cache.seen == [25, 30, 30] and cache.held == [[12, 12, 12]] * 2
    for row, origin in enumerate(order):
        segment, at = cache.of_row(row)
        for store, old in zip(segment.stores, before[origin], strict=True):
            assert all(torch.equal(now[at], old[name][0]) for name, now in state(store).items())


@pytest.mark.parametrize("settings", [OBSERVING, ACCUMULATING, IN_CACHE], ids=lambda s: s["method"])
def test_reordered_rows_go_on_as_if_they_had_always_been_there(settings: dict[str, object]) -> None:
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in (30, 20)]
    moved, direct = pair.cache(**settings), pair.cache(**settings)
    tiny.forward(pair.model, moved, rows)
    moved.reorder_cache(torch.tensor([1, 0]))
    tiny.forward(pair.model, direct, rows[::-1])
    for i in range(9):
        a, b = (tiny.forward(pair.model, c, [[i], [i]], starts=[20 + i, 30 + i]) for c in (moved, direct))
        assert (a - b).abs().max() <= 1e-4


def test_repeating_rows_copies_them() -> None:
    pair = tiny.pair("llama")
    cache = pair.cache(**ACCUMULATING)
    tiny.forward(pair.model, cache, [tiny.tokens(30), tiny.tokens(20)])
    cache.batch_repeat_interleave(2)
    assert cache.seen == [30, 30, 20, 20]
    assert all(torch.equal(s.keys[0], s.keys[1]) and torch.equal(s.keys[2], s.keys[3]) for s in cache.stores)
