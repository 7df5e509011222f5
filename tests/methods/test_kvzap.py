"""KVzap: made-up surrogates of the published form, in plain loops over a stock model's hidden states in float64."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from methods.plain import LENGTHS, NAMES, choose, dot
from methods.test_kept_sets import held_by
from methods.test_open_budgets import held
from safetensors.torch import save_file

from kv_lm_eval.cache.fan import Fan
from kv_lm_eval.cache.make import hand_out, make_cache, make_fan
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.prefill import feed, prefill
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError

WIDTH, BETWEEN, CAPACITY = 32, 6, 14
KV_HEADS = {"llama": 2, "gpt_neox": 4}
FORMS = {"linear": None, "mlp": BETWEEN}
Maps = list[tuple[list[list[float]], list[float]]]


def surrogate(folder: Path, form: str, name: str, layers: int = 2, **wrong: Any) -> list[Maps]:
    """Writes a made-up one in the published form; its maps as lists, layer by layer."""
    random, between = torch.Generator().manual_seed(7), FORMS[form]
    config = {"model_type": "kvzap", "input_dim": WIDTH, "output_dim": KV_HEADS[name], "n_modules": layers}
    config |= {"hidden_dim": between, "architectures": ["KVzapModel"], **wrong}
    sizes = [(WIDTH, KV_HEADS[name])] if between is None else [(WIDTH, between), (between, KV_HEADS[name])]
    tensors, maps = {}, []
    for layer in range(layers):
        maps.append([])
        for part, (inputs, outputs) in zip(("0.", "2."), sizes, strict=False):
            root = f"layers.{layer}." + ("" if between is None else part)
            weight = torch.randn(outputs, inputs, generator=random)
            tensors[root + "weight"], tensors[root + "bias"] = weight, torch.randn(outputs, generator=random)
            maps[-1].append((weight.double().tolist(), tensors[root + "bias"].double().tolist()))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return maps


@functools.cache
def net(name: str) -> tuple[Any, Any]:
    """In float64, under our attention."""
    built = tiny.build(name)
    facts = wrap(built, tiny.compression(method="full"))
    return built.double(), facts


def hidden_states(name: str, row: list[int]) -> list[list[list[float]]]:
    """[layer][token][M] what each attention module of a stock model is given."""
    model, found = tiny.build(name).double(), []
    ends = ("self_attn", "attention")
    modules = [m for path, m in model.named_modules() if path.endswith(ends)]
    for module in modules:
        module.register_forward_pre_hook(
            lambda _, args, kwargs: found.append((args or [kwargs["hidden_states"]])[0][0].tolist()), with_kwargs=True
        )
    with torch.inference_mode():
        model(input_ids=torch.tensor([row]), use_cache=False)
    assert len(found) == 2
    return found


def says(maps: Maps, hidden: list[float]) -> list[float]:
    """Of one token, for each KV head."""
    out = hidden
    for i, (weight, bias) in enumerate(maps):
        if i:
            out = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in out]
        out = [dot(line, out) + b for line, b in zip(weight, bias, strict=True)]
    return out


def scores(name: str, row: list[int], maps: list[Maps]) -> list[list[dict[int, float]]]:
    """By layer and KV head, of each position."""
    found = []
    for own, states in zip(maps, hidden_states(name, row), strict=True):
        table = [says(own, state) for state in states]
        found.append([dict(enumerate(column)) for column in zip(*table, strict=True)])
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_what_the_surrogate_scores_highest_stays(name: str, form: str, tmp_path: Path) -> None:
    maps, (model, facts) = surrogate(tmp_path, form, name), net(name)
    rows = [tiny.tokens(n, seed=n) for n in LENGTHS]
    settings = {"surrogate": str(tmp_path), "max_capacity_prompt": CAPACITY, "compress_every": 99}
    compression = tiny.compression(method="kvzap", **settings)
    compression.check_model(facts)
    cache, _ = prefill(model, lambda: make_cache(compression, facts), rows)
    for i, row in enumerate(rows):
        whole, (segment, at) = scores(name, row, maps), cache.of_row(i)
        expected = [[choose([*s.values()], CAPACITY) for s in layer] for layer in whole]
        assert held_by(cache, i) == expected, f"row of {len(row)} tokens"
        for layer, store in zip(whole, segment.stores, strict=True):
            for head, own in enumerate(layer):
                places = store.pos[at].expand(len(layer), -1)[head].tolist()
                assert store.mass[at, head].tolist() == pytest.approx([own[t] for t in places], abs=1e-9)
    assert cache.snapshot()["overhead_bytes"] < LENGTHS[0] * WIDTH * 8, "less than a layer's hidden states of a row"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_pairs_under_a_threshold_go_after_the_prompt_and_as_they_age(name: str, form: str, tmp_path: Path) -> None:
    maps, (model, facts) = surrogate(tmp_path, form, name), net(name)
    rows, line, recent = [tiny.tokens(n, seed=n) for n in LENGTHS], 0.3, 5
    settings = {"surrogate": str(tmp_path), "threshold": line, "threshold_recent": recent, "compress_every": 3}
    compression = tiny.compression(method="kvzap", **settings)
    cache, _ = prefill(model, lambda: make_cache(compression, facts), rows)
    whole = [scores(name, row, maps) for row in rows]  # what follows the prompt is made of a cache that was cut
    for steps in range(8):
        if steps:
            feed(model, cache, [[row[steps]] for row in rows], keep=1)
        cut = steps // 3 * 3
        for i, row in enumerate(rows):
            for got, want in zip(held(cache, i), whole[i], strict=True):
                for head, own in zip(got, want, strict=True):
                    prompt = {t for t, s in own.items() if s >= line or t >= len(row) + cut - recent}
                    assert {t for t in head if t < len(row)} == prompt, (steps, i)
                    assert {*range(max(len(row), len(row) + cut - recent), len(row) + steps)} <= set(head)
    assert 8 < min(map(len, held(cache, 0)[0])) < len(rows[0])


def test_the_hidden_states_are_the_layers_own_and_a_later_token_is_scored_when_it_comes(tmp_path: Path) -> None:
    """By one token at a time, all at once, and in chunks: the same scores."""
    surrogate(tmp_path, "mlp", "llama")
    model, facts = net("llama")
    compression = tiny.compression(
        method="kvzap", surrogate=str(tmp_path), max_capacity_prompt=CAPACITY, compress_every=4
    )
    row, kept = tiny.tokens(41), []
    for chunk in (None, 7, 16):
        cache, _ = prefill(model, lambda chunk=chunk: make_cache(compression, facts, chunk), [row])
        for t in range(9):
            feed(model, cache, [[t + 1]], keep=1)
        kept.append((held_by(cache, 0), [store.mass.clone() for store in cache.stores]))
    for other, numbers in kept[1:]:
        assert other == kept[0][0]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(numbers, kept[0][1], strict=True))


def test_one_prefill_for_several_methods_scores_the_same(tmp_path: Path) -> None:
    surrogate(tmp_path, "linear", "llama")
    model, facts = net("llama")
    rows = [tiny.tokens(n, seed=n) for n in LENGTHS]
    wanted = [
        tiny.compression(method="kvzap", surrogate=str(tmp_path), max_capacity_prompt=CAPACITY),
        tiny.compression(method="knorm", max_capacity_prompt=CAPACITY),
    ]
    caches = [make_cache(compression, facts) for compression in wanted]
    whole = make_fan(tiny.compression(method="full"), caches, len(rows))
    assert isinstance(whole.segments[0], Fan)
    feed(model, whole, rows, keep=1)
    hand_out(whole, caches)
    for compression, cache in zip(wanted, caches, strict=True):
        alone, _ = prefill(model, lambda c=compression: make_cache(c, facts), rows)
        assert [held_by(cache, i) for i in range(3)] == [held_by(alone, i) for i in range(3)]


def test_a_stream_equals_the_loop_over_single_tokens(tmp_path: Path) -> None:
    surrogate(tmp_path, "mlp", "llama")
    model, facts = net("llama")
    compression = tiny.compression(method="kvzap", surrogate=str(tmp_path), max_capacity_prompt=9, compress_every=6)
    document = tiny.tokens(50, seed=3)
    ((got, *_), *_), _ = score_documents(model, lambda: make_cache(compression, facts), [document], Stream(5, 6)), None
    cache, logs = make_cache(compression, facts), []
    for i, (token, target) in enumerate(zip([5, *document[:-1]], document, strict=True)):
        cache.mode = "decode"
        logits = tiny.forward(model, cache, [[token]], starts=[i])[0, -1]
        logs.append(logits.log_softmax(-1)[target])
    assert (got.log_probs - torch.stack(logs)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_nearly_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    surrogate(tmp_path, "mlp", "llama")
    rows, kept = [tiny.tokens(40, seed=1), tiny.tokens(24, seed=2)], []
    compression = tiny.compression(method="kvzap", surrogate=str(tmp_path), max_capacity_prompt=CAPACITY)
    for kind in (torch.float32, dtype):
        model = tiny.build("llama").to(kind)
        facts = wrap(model, compression)
        cache, logits = prefill(model, lambda f=facts: make_cache(compression, f), rows)
        assert all(own.isfinite().all() for own in logits.values())
        kept.append(
            {(b, i, h, t) for b in range(2) for i in range(2) for h in range(2) for t in held_by(cache, b)[i][h]}
        )
    assert len(kept[0] & kept[1]) > 0.9 * len(kept[0])


@pytest.mark.parametrize(
    ("more", "total"),
    [
        ({"head_budget": "ada"}, CAPACITY),
        ({"layer_budget": "pyramid"}, CAPACITY),
        ({"layer_budget": "global"}, CAPACITY),
        ({"unit": "chunk", "unit_size": 4}, CAPACITY),
        ({"compress_every": 1}, CAPACITY),
        ({"nbits": 4, "residual_length": 4, "group_size": 4}, CAPACITY),
        ({"evicted": "compensate", "weight": "uniform", "block_size": 5}, CAPACITY),
        ({"evicted": "d2o"}, CAPACITY),
    ],
)
def test_it_composes(more: dict[str, object], total: int, tmp_path: Path) -> None:
    surrogate(tmp_path, "linear", "llama")
    model, facts = net("llama")
    compression = tiny.compression(
        method="kvzap", surrogate=str(tmp_path), max_capacity_prompt=CAPACITY, **{"compress_every": 3, **more}
    )
    cache, _ = prefill(model, lambda: make_cache(compression, facts), [tiny.tokens(n, seed=n) for n in LENGTHS])
    for t in range(6):
        feed(model, cache, [[t + 1]] * 3, keep=1)
    for row in range(3):
        assert sum(layer[row] for layer in cache.held) / 2 == pytest.approx(total)


def test_what_it_cannot_go_with_is_refused_with_the_reason(tmp_path: Path) -> None:
    common = {"method": "kvzap", "max_capacity_prompt": CAPACITY}
    with pytest.raises(UserError, match=r"surrogate=DIR.*untrained.*kvzip"):
        tiny.compression(**common)
    with pytest.raises(UserError, match="there is no file .*config.json"):
        tiny.compression(**common, surrogate=str(tmp_path / "none"))
    with pytest.raises(UserError, match="weight=attn|attention"):
        tiny.compression(**common, surrogate="untrained", evicted="compensate", block_size=5)
    (warning,) = tiny.compression(**common, surrogate="untrained").method.warnings(None)
    assert "made-up" in warning and "random" in warning


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n_modules": 3}, "layers.2.0.weight should be .6, 32. by config.json, and is not there"),
        ({"input_dim": 16}, r"layers.0.0.weight should be \[6, 16\] by config.json, and is \[6, 32\]"),
        ({"hidden_dim": None}, "layers.0.weight should be .2, 32."),
        ({"output_dim": "2"}, "output_dim"),
    ],
)
def test_a_folder_that_is_not_what_it_says_is_refused(wrong: dict[str, Any], words: str, tmp_path: Path) -> None:
    surrogate(tmp_path, "mlp", "llama", **wrong)
    with pytest.raises(UserError, match=words) as error:
        tiny.compression(method="kvzap", max_capacity_prompt=9, surrogate=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_surrogate_of_another_model_is_refused_and_its_own_is_in_the_results(tmp_path: Path) -> None:
    facts = net("llama")[1]
    for layers, name, words in ((3, "llama", "of 3 layers"), (2, "gpt_neox", "4 KV heads")):
        surrogate(tmp_path, "linear", name, layers)
        with pytest.raises(UserError, match=words):
            tiny.compression(method="kvzap", max_capacity_prompt=9, surrogate=str(tmp_path)).check_model(facts)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="is no safetensors file"):
        tiny.compression(method="kvzap", max_capacity_prompt=9, surrogate=str(tmp_path))
    surrogate(tmp_path, "linear", "llama")
    tensors = {f"layers.{i}.{kind}": torch.zeros(*shape) for i in range(2)
               for kind, shape in (("weight", (2, 16)), ("bias", (2,)))}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "input_dim": 16}))
    compression = tiny.compression(method="kvzap", max_capacity_prompt=9, surrogate=str(tmp_path))
    assert len(compression.settings()["surrogate_sha256"]) == 64
    model = net("llama")[0]
    with pytest.raises(UserError, match=r"takes hidden states of 16 numbers, the model's have 32"):
        prefill(model, lambda: make_cache(compression, facts), [tiny.tokens(30)])
