"""Kernels without a mask equal attention written out, whatever the shapes; on a GPU, the right one is chosen."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from kv_lm_eval.cache import attention, kernels

EXACT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def written_out(query, keys, values, scale, reach=None, softcap=None):
    """Softmax of all logits in float64, hidden slots left out."""
    group, q, n = query.shape[1] // keys.shape[1], query.shape[2], keys.shape[2]
    query, keys, values = (x.double() for x in (query, keys, values))
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    logits = query @ keys.transpose(2, 3) * scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    behind = torch.arange(n - q, n, device=query.device)[:, None] - torch.arange(n, device=query.device)
    hidden = (behind < 0) | (behind >= (n if reach is None else reach))
    return logits.masked_fill(hidden, float("-inf")).softmax(-1) @ values


def drawn(seed, dtype, value_size=None, device="cpu"):
    """Queries, keys, values, scale and reach of a random shape."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, kv_heads, group, size = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 3), draw.choice([4, 8, 24])
    q, old = draw.randint(1, 40), draw.choice([0, draw.randint(1, 60)])
    query = torch.randn(rows, kv_heads * group, q, size, device=device).to(dtype)
    room = torch.randn(2, rows, kv_heads, old + q + draw.randint(0, 9), size, device=device).to(
        dtype
    )  # a store lends it
    keys, values = room[0, :, :, : old + q], room[1, :, :, : old + q]
    if value_size:
        values = values[..., :value_size]
    return query, keys, values, draw.choice([0.3, size**-0.5]), draw.choice([None, draw.randint(1, 50)])


@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
def test_random_shapes_windows_and_groups(dtype):
    met = set()
    for seed in range(150):
        query, keys, values, scale, reach = drawn(seed, dtype)
        met.add(kernels.choose(query, keys, values, reach))
        out = kernels.unmasked(query, keys, values, scale, reach)
        assert out is not None and out.dtype == dtype and out.shape == query.shape
        torch.testing.assert_close(
            out.double(), written_out(query, keys, values, scale, reach), rtol=0, atol=EXACT[dtype]
        )
    assert met == {"all", "causal", "parts", "tiles"}


def test_blocks_are_laid_out_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(kernels, "TILE_TOKENS", 10)
    for seed in range(60):
        query, keys, values, scale, _ = drawn(seed, torch.float64)
        out = kernels.unmasked(query, keys, values, scale, 3)
        torch.testing.assert_close(out, written_out(query, keys, values, scale, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_step_with_and_without_a_mask(softcap):
    """What a mask is needed for (a softcap, values of another size) gives the same by the other road."""
    for seed in range(80):
        query, keys, values, scale, reach = drawn(seed, torch.float64, 4 if seed % 2 else None)
        n, q = keys.shape[2], query.shape[2]
        place = torch.arange(n, device=query.device).expand(query.shape[0], 1, n)
        step = attention.Step(
            0, query, keys[:, :, n - q :], values[:, :, n - q :], place[:, 0, n - q :], scale, reach, softcap
        )
        seen = attention.Visible(keys, values, place, n - q, whole=True, reach=reach)
        expected = written_out(query, keys, values, scale, reach, softcap)
        for view in (seen, seen._replace(whole=False)):
            torch.testing.assert_close(attention.attend(step, view), expected, rtol=0, atol=1e-12)


# --- on a GPU -------------------------------------------------------------------------------------------------------

without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@without
@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
def test_kernels_of_a_gpu(dtype):
    met = set()
    for seed in range(150):
        query, keys, values, scale, reach = drawn(seed, dtype, device="cuda")
        kernel = kernels.choose(query, keys, values, reach)
        met.add(kernel)
        out = kernels.unmasked(query, keys, values, scale, reach)
        assert (out is None) == (kernel == "masked")
        if out is not None:
            exact = written_out(query, keys, values, scale, reach)
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=EXACT[dtype])
    half = dtype in (torch.bfloat16, torch.float16)
    assert met == {"all", "causal", "lower_right", "masked"} | ({"varlen"} if half else set())  # size 4: no flash


@pytest.mark.gpu
@without
@pytest.mark.parametrize("size", [64, 128])
def test_flash_serves_what_is_said_of_it(size):
    """No other kernel is allowed, so that a call that flash does not take would end in an error."""
    generator = torch.Generator("cuda").manual_seed(0)
    for q, n, reach in ((1, 500, None), (1, 500, 100), (300, 300, None), (100, 500, None), (100, 500, 200)):
        query, keys, values = (
            torch.randn(2, h, t, size, device="cuda", generator=generator).bfloat16()
            for h, t in ((8, q), (2, n), (2, n))
        )
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = kernels.unmasked(query, keys, values, size**-0.5, reach)
        exact = written_out(query, keys, values, size**-0.5, reach)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=EXACT[torch.bfloat16])


# --- what a GPU would be given --------------------------------------------------------------------------------------


def on_a_gpu(monkeypatch, capability, dtype, q, n, size=64, heads=(8, 2)):
    """Tensors [2, heads, q or n, size] of a GPU that is not there: shapes and types only."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(
            torch.empty(2, h, t, size, dtype=dtype, device="cuda")
            for h, t in ((heads[0], q), (heads[1], n), (heads[1], n))
        )


@pytest.mark.parametrize(
    ("dtype", "capability", "q", "n", "size", "reach", "kernel"),
    [
        (torch.bfloat16, (9, 0), 1, 500, 64, None, "all"),
        (torch.bfloat16, (9, 0), 1, 500, 64, 100, "all"),
        (torch.float16, (8, 0), 300, 300, 64, None, "causal"),
        (torch.float16, (8, 0), 300, 300, 64, 300, "causal"),
        (torch.bfloat16, (9, 0), 100, 500, 64, None, "lower_right"),
        (torch.float32, (9, 0), 100, 500, 64, None, "lower_right"),
        (torch.bfloat16, (9, 0), 100, 500, 64, 200, "varlen"),
        (torch.bfloat16, (9, 0), 300, 300, 128, 200, "varlen"),
        (torch.float32, (9, 0), 100, 500, 64, 200, "masked"),
        (torch.bfloat16, (7, 5), 100, 500, 64, 200, "masked"),
        (torch.bfloat16, (9, 0), 100, 500, 36, 200, "masked"),
    ],
)
def test_the_kernel_of_a_gpu(monkeypatch, dtype, capability, q, n, size, reach, kernel):
    assert kernels.choose(*on_a_gpu(monkeypatch, capability, dtype, q, n, size), reach) == kernel


def test_a_gpu_kernel_with_a_window_takes_what_it_is_given():
    """Shapes and types pass torch's own check of the call."""
    query, keys, values = (
        torch.empty(2, h, n, 64, dtype=torch.bfloat16, device="meta") for h, n in ((8, 100), (2, 500), (2, 500))
    )
    out = kernels._varlen(query, keys, values, 0.125, 200)
    assert out.shape == query.shape and out.dtype == query.dtype


def test_torchs_lower_right_is_ours():
    """The kernel of a GPU for a chunk after the first, in its form for a CPU."""
    for seed in range(60):
        query, keys, values, scale, _ = drawn(seed, torch.float64)
        if query.shape[2] > 1 and keys.shape[2] > query.shape[2]:
            out = kernels._torch_lower_right(query, keys, values, scale)
            torch.testing.assert_close(out, kernels.unmasked(query, keys, values, scale), rtol=0, atol=1e-12)


def test_rows_in_one_launch_are_ours(monkeypatch):
    """The kernel of a GPU for windows, by what torch says of its arguments: row after row, a window to the left."""

    def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        outs = []
        for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
            assert b - a <= max_q and d - c <= max_k and window_size[1] == 0
            assert enable_gqa == (query.shape[1] != key.shape[1])
            own = (x[None].transpose(1, 2) for x in (query[a:b], key[c:d], value[c:d]))
            reach = None if window_size[0] < 0 else window_size[0] + 1
            outs.append(written_out(*own, scale, reach)[0].transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr(kernels.varlen, "varlen_attn", documented)
    for seed in range(60):
        query, keys, values, scale, reach = drawn(seed, torch.float64)
        out = kernels._varlen(query, keys, values, scale, reach)
        torch.testing.assert_close(out, written_out(query, keys, values, scale, reach), rtol=0, atol=1e-12)
