"""fp8 and turboquant: what is read back, by loops that share nothing with them, their error, and their bytes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from on_device import DEVICE
from storage_loops import FLOATS, HEADS, SIZE, VALUE_SIZE, Twins, float8, lloyd_max, to_float8

from kv_lm_eval.cache import coded
from kv_lm_eval.cache.coded import encode, pack, unpack
from kv_lm_eval.cache.store import Kept
from kv_lm_eval.methods.storages.fp8 import FORMATS, Floats, Fp8
from kv_lm_eval.methods.storages.kivi import Kivi
from kv_lm_eval.methods.storages.think import Think
from kv_lm_eval.methods.storages.turboquant import Rotated, TurboQuant, codebook, projection, rotation

HERE = torch.device(DEVICE)
CASES = [
    (Fp8(calibration_tokens=1), 0, 0.8),
    (Fp8(fp8_format="e5m2", calibration_tokens=25, residual_length=3), 2, 0.7),
    (Fp8(fp8_scale="token", code_every=4, residual_length=5), 1, 0.8),
    (Fp8(fp8_scale="unit", fp8_format="e5m2"), 0, 0.6),
    (Think(calibration_tokens=1, channel_queries=5, residual_length=4, code_every=1), 0, 0.8),
    (Think(calibration_tokens=25, key_channel_ratio=0.75, channel_queries=1, residual_length=0, code_every=2), 2, 0.7),
    (Think(calibration_tokens=24, key_channel_ratio=0.2, channel_queries=99, code_every=3, residual_length=9), 1, 0.8),
    (TurboQuant(nbits=2), 0, 0.8),
    (TurboQuant(k_bits=3, v_bits=4, residual_length=6, code_every=3), 2, 0.7),
    (TurboQuant(nbits=3, qjl=True, rotation_seed=5), 1, 0.8),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("storage", "sinks", "share"), CASES)
def test_any_course_of_prompts_cuts_and_tokens_reads_back_as_the_loops_do(
    storage: Fp8 | TurboQuant | Think, sinks: int, share: float, seed: int
) -> None:
    twins = Twins(storage, sinks, rows=2, seed=seed)
    twins.feed(23)
    twins.cut(share)
    if storage.due(0, 23):
        twins.settle()
    twins.check()
    for turn in range(10):
        twins.step(1 if turn % 3 else 1 + turn % 4)
        if turn % 4 == 3:
            twins.cut(share, change=0.3 if turn == 7 else 0.0)
        twins.check()
    assert all(sum(row) for row in twins.store.coded)
    fork = twins.store.select([1, 0, 1])
    for mine, theirs in ((fork.keys, twins.store.keys), (fork.values, twins.store.values)):
        assert (mine - theirs[[1, 0, 1]]).abs().max() <= 1e-5  # a product's last digit differs with its shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "storage", [Fp8(calibration_tokens=1), Fp8(fp8_scale="token"), TurboQuant(qjl=True), Think(residual_length=3)]
)
def test_half_precision_is_read_back_in_its_own_format(storage: Fp8 | TurboQuant | Think, dtype: torch.dtype) -> None:
    twins = Twins(storage, 0, rows=2, seed=5, dtype=dtype)
    for head in itertools.chain(*twins.heads):
        head.least = 2 * torch.finfo(dtype).eps if head.near else 0.0
    twins.feed(19)
    twins.settle()
    twins.check()
    twins.cut(0.7)
    twins.step(2)
    twins.check()


def test_a_survivor_of_many_cuts_reads_as_it_did() -> None:
    """Numbers of a product differ in the last digit with its shape: whether a pair was changed is no matter of them."""
    twins = Twins(TurboQuant(nbits=2), 0, rows=1, seed=0)
    store = twins.store
    twins.feed(40)
    store.settle()
    held = {name: x[0, :, 5].clone() for name, x in store._coded_keys.of_pair.items()}
    kept = [5, *range(20, 40)]
    for token in range(40, 200):
        slots = torch.tensor(kept).view(1, 1, -1)
        keys, values, pos = (x[:, :, kept] for x in (store.keys, store.values, store.pos))
        store.replace(Kept(keys, values, pos, None, slots=slots), room=1)
        twins.store.append(
            twins.numbers(1, HEADS, 1, SIZE), twins.numbers(1, HEADS, 1, VALUE_SIZE), torch.tensor([[token]])
        )
        store.settle()
        kept = [0, *range(2, 22)]
    assert all(torch.equal(x[0, :, 0], held[name]) for name, x in store._coded_keys.of_pair.items())


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize("size", [1, 7, 8, 33, 80])
def test_numbers_are_packed_without_a_gap(nbits: int, size: int) -> None:
    codes = torch.randint(2**nbits, (3, 2, size), generator=torch.Generator().manual_seed(size), dtype=torch.uint8)
    packed = pack(codes, nbits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-size * nbits // 8))
    assert packed.untyped_storage().nbytes() == packed.numel()
    assert torch.equal(unpack(packed, nbits)[..., :size], codes)
    for line, numbers in zip(packed.view(-1, packed.shape[-1]).tolist(), codes.view(-1, size).tolist(), strict=True):
        bits = [n >> i & 1 for n in numbers for i in range(nbits)]
        assert [byte >> i & 1 for byte in line for i in range(8)][: len(bits)] == bits


# --- floats of 8 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "exponent_bits"), [("e4m3", 4), ("e5m2", 5)])
def test_all_256_bytes_read_as_their_bits_say(name: str, exponent_bits: int) -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    part = coded.Coded(Floats(name, "unit"), 256, torch.float32, {"codes": bytes_.view(1, 1, 1, 256)})
    expected = torch.tensor([float8(code, exponent_bits) for code in range(256)])
    assert torch.equal(part.decode().flatten().nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))
    assert {"e4m3": 448.0, "e5m2": 57344.0}[name] == max(FLOATS[name].values()) == Floats(name, "unit").largest


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_goes_to_the_nearest_float_and_the_largest_stay_finite(name: str) -> None:
    numbers = sorted(FLOATS[name].values())
    ties = [(a + b) / 2 for a, b in itertools.pairwise(numbers)]
    around = [np.nextafter(np.float32(t), np.float32(s)) for t in ties for s in (-np.inf, np.inf)]
    beyond = [1e9, -1e9, math.inf, -math.inf, numbers[-1] * 1.03, 3e38, 1e-30, 0.0]
    x = torch.tensor([float(v) for v in (*numbers, *ties, *around, *beyond)])
    held = encode(Floats(name, "unit"), x.view(1, 1, 1, -1), torch.ones(1, 1, 1, dtype=torch.bool))
    got = held.of_pair["codes"].flatten().tolist()
    expected = [to_float8(min(max(float(v), numbers[0]), numbers[-1]), name) for v in x.tolist()]
    assert [FLOATS[name][c] for c in got] == [FLOATS[name][c] for c in expected]


def test_a_heads_scale_comes_from_what_is_coded_first_and_stays() -> None:
    x = torch.randn(2, 3, 9, 5, generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 3, 9, dtype=torch.bool)
    real[1, 2] = False  # a head that has no pair yet
    x[0, 0, 4] = float("nan")  # of an empty slot
    real[0, 0, 4] = False
    first = encode(Floats("e4m3", "head"), x, real)
    later = encode(Floats("e4m3", "head"), x.nan_to_num() * 100, torch.ones_like(real), first)
    for b, h in itertools.product(range(2), range(3)):
        largest = x[b, h][real[b, h]].abs().max() if (b, h) != (1, 2) else (x[1, 2] * 100).abs().max()
        assert float(later.of_head["scale"][b, h]) == np.float32(float(largest)) / np.float32(448)
        assert later.decode()[b, h].abs().max() <= largest * 1.0001, "what is larger later is limited"
    assert first.of_head["scale"][1, 2] == 0 and first.decode()[1, 2].isfinite().all()


def test_a_tokens_scale_is_applied_as_vllm_does() -> None:
    """Times the inverse, rounded to float32: where that and the quotient lie on two sides of a tie, codes differ."""
    generator = np.random.default_rng(0)
    largest = generator.uniform(1, 9, 400).astype(np.float32)
    largest[:40] *= np.float32(1e-5)  # a scale is no smaller than 1e-6, so that these are held in few steps
    scale = np.maximum(largest / np.float32(448), np.float32(1e-6))
    numbers = np.array(sorted(FLOATS["e4m3"].values()), np.float32)
    ties = ((numbers[1:] + numbers[:-1]) / 2)[140:]
    near = (scale[:, None] * ties).astype(np.float32)
    x = np.stack([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(9))], -1).reshape(400, -1)
    x = np.minimum(x, largest[:, None])
    times, over = x * (np.float32(1) / scale)[:, None], x / scale[:, None]
    expected, other = (torch.from_numpy(v).to(HERE).clamp(-448, 448).to(FORMATS["e4m3"]).float() for v in (times, over))
    assert (expected != other).any()
    vectors = torch.from_numpy(np.concatenate([largest[:, None], x], 1))[None, None].to(HERE)
    got = encode(Floats("e4m3", "token"), vectors, torch.ones(1, 1, 400, dtype=torch.bool)).of_pair
    assert torch.equal(got["codes"][0, 0].view(FORMATS["e4m3"]).float()[:, 1:], expected)
    assert torch.equal(got["scale"][0, 0].cpu(), torch.from_numpy(scale)) and (scale[:40] == np.float32(1e-6)).all()


def test_a_scale_outlives_the_pairs_that_it_came_from() -> None:
    twins = Twins(Fp8(calibration_tokens=1), 0, rows=1, seed=3)
    twins.feed(12)
    twins.settle()
    scale = twins.store._coded_keys.of_head["scale"].clone()
    nothing = torch.zeros(1, 1, 0, dtype=torch.long)
    empty = Kept(
        twins.store.keys[:, :, :0], twins.store.values[:, :, :0], twins.store.pos[:, :, :0], None, slots=nothing
    )
    twins.store.replace(empty, room=4)
    twins.store.append(torch.ones(1, HEADS, 2, SIZE), torch.ones(1, HEADS, 2, VALUE_SIZE), torch.tensor([[12, 13]]))
    twins.store.settle()
    assert torch.equal(twins.store._coded_keys.of_head["scale"], scale) and twins.store.coded == [[2] * HEADS]


def test_nothing_is_coded_before_the_scales_of_heads_can_be_known() -> None:
    storage = Fp8(calibration_tokens=10, code_every=3)
    assert [n for n in range(1, 20) if storage.due(n - 1, n)] == [10, 12, 15, 18]
    assert not storage.due(0, 9) and storage.due(0, 10) and storage.due(4, 40)
    assert [storage.until_due(n) for n in (0, 4, 9, 10, 11, 12)] == [10, 6, 1, 2, 1, 3]
    assert Fp8(fp8_scale="token").until_due(0) == Fp8(fp8_scale="unit").until_due(0) == 1


# --- turned vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codewords_are_those_of_a_numeric_search(bits: int) -> None:
    assert np.abs(codebook(bits, HERE).cpu().numpy() - lloyd_max(bits)).max() < 1e-5
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randn(200_000, generator=generator, dtype=torch.float64)
    words = codebook(bits, HERE).double()
    error = (numbers - words[(numbers[:, None] - words).abs().argmin(1)]).square().mean()
    assert abs(error - {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]) < 0.02 * error, "Max, 1960, table I"


@pytest.mark.parametrize("size", [5, 16, 80, 128])
def test_the_rotation_is_one(size: int) -> None:
    turn = rotation(size, 0, HERE).double()
    assert (turn @ turn.T - torch.eye(size)).abs().max() < 1e-5
    assert not torch.equal(rotation(size, 0, HERE), rotation(size, 1, HERE))
    assert (rotation(size, 0, HERE) * projection(size, 0, HERE)).sum().abs() < 6 * size**0.5, "of other draws"


def distortion(codec: Rotated, size: int, pairs: int = 3000) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean squared error of unit vectors, and products with a query of length 1: true and read."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(1, 1, pairs, size, generator=generator)
    x[..., 0] += 20  # one large channel, as keys have
    x = x / x.norm(dim=-1, keepdim=True)
    query = torch.randn(size, generator=generator)
    query /= query.norm()
    got = encode(codec, x, torch.ones(1, 1, pairs, dtype=torch.bool)).decode()
    return float((got - x).square().sum(-1).mean()), x[0, 0] @ query, got[0, 0] @ query


@pytest.mark.parametrize(("nbits", "figure"), [(2, 0.117), (3, 0.03), (4, 0.009)])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_the_error_is_the_papers_figure_and_below_its_bound(nbits: int, figure: float, size: int) -> None:
    error = distortion(Rotated(nbits, False, 0), size)[0]
    assert error < math.sqrt(3) * math.pi / 2 / 4**nbits, "theorem 1"
    assert error == pytest.approx({0.03: 0.0345, 0.009: 0.0095}.get(figure, figure), rel=0.1)


@pytest.mark.parametrize(("nbits", "figure"), [(2, 0.56), (3, 0.18), (4, 0.047)])
@pytest.mark.parametrize("size", [64, 80])
def test_products_are_right_on_average_with_the_sign_bit_and_as_spread_as_the_paper_says(
    nbits: int, figure: float, size: int
) -> None:
    off, spread, plain = [], [], []
    for seed in range(12):
        _, true, read = distortion(Rotated(nbits, True, seed), size, 500)
        off.append((read - true).mean())
        spread.append((read - true).square().mean())
        _, true, read = distortion(Rotated(2, False, seed), size, 500)
        plain.append((read * true).sum() / true.square().sum())
    mean, error = float(torch.stack(off).mean()), float(torch.stack(off).std() / 12**0.5)
    assert abs(mean) < 4 * error
    assert float(torch.stack(spread).mean()) * size == pytest.approx(figure, rel=0.35), "theorem 2"
    assert float(torch.stack(plain).mean()) < 0.93, "without it they come out too small"


def test_a_zero_vector_a_huge_one_and_empty_slots_stay_finite() -> None:
    x = torch.zeros(1, 1, 4, 6, dtype=torch.bfloat16)
    x[0, 0, 1], x[0, 0, 2] = 1e6, float("nan")
    real = torch.tensor([[[True, True, False, True]]])
    for qjl in (False, True):
        got = encode(Rotated(3, qjl, 0), x, real).decode()
        assert got.isfinite().all() and not got[0, 0, 0].any() and not got[0, 0, 3].any()
        assert got[0, 0, 1].float().norm() > 50_000


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "each"),
    [
        (Kivi(nbits=3, group_size=64, residual_length=0, key_axis="token"), 2 * (24 + 4)),
        (Fp8(calibration_tokens=1), 2 * 64),
        (Fp8(fp8_scale="token"), 2 * (64 + 4)),
        (TurboQuant(nbits=3), 2 * (24 + 2)),
        (TurboQuant(k_bits=4, v_bits=2), 32 + 16 + 2 * 2),
        (TurboQuant(nbits=4, qjl=True), 2 * (24 + 8 + 4)),
    ],
)
def test_bytes_by_hand_at_a_head_size_of_64(storage: Kivi | Fp8 | TurboQuant, each: int) -> None:
    twins = Twins(storage, 0, rows=1, seed=0)
    keys, values = torch.randn(2, 1, HEADS, 128, 64)
    twins.store.append(keys, values, torch.arange(128)[None])
    twins.store.settle()
    scales = 2 * 4 * HEADS if getattr(storage, "fp8_scale", "") == "head" else 0
    assert twins.store.valid_bytes([128]) == [128 * HEADS * each + scales]
    shared = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in twins.store.shared}.values())
    words = {2**b * 4 for b in (storage.k_bits, storage.v_bits) if b} if isinstance(storage, TurboQuant) else set()
    if isinstance(storage, TurboQuant):
        words = words or {2 ** (storage.nbits - storage.qjl) * 4}
        assert shared == sum(words) + 64 * 64 * 4 * (1 + storage.qjl)
    else:
        assert shared == 0
