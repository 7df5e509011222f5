"""Head statistics against plain loops over the stock model's eager attention; the classifier on hand-made heads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf

from kv_lm_eval.analysis import head_statistics
from kv_lm_eval.analysis.classifier import Thresholds, classify
from kv_lm_eval.analysis.head_statistics import HeadStatistics, LayerSums, measure
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import head_profile
from kv_lm_eval.methods.head_profile import Head, HeadProfile

NAMES = ("entropy", "entropy_std", "max_weight", "sink", "local", "recent", "far", "uniformity")


def by_loops(rows: list[list[list[float]]]) -> dict[str, float | list[float]]:
    """Every statistic of one head from its attention rows: for each chunk, query q's weights on keys 0 .. q it sees."""
    seen = [[(q, {k: w for k, w in enumerate(row[: q + 1])}) for q, row in enumerate(chunk)] for chunk in rows]
    queries = [query for chunk in seen for query in chunk]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    entropies = [-sum(w * math.log(w + 1e-10) for w in keys.values()) for _, keys in queries]
    sink = mean([sum(w for k, w in keys.items() if k < 4) for _, keys in queries])
    local = mean([sum(w for k, w in keys.items() if k >= q - 8) for q, keys in queries])
    return {
        "entropy": mean(entropies),
        "entropy_std": math.sqrt(mean([(e - mean(entropies)) ** 2 for e in entropies])),
        "max_weight": mean([max(keys.values()) for _, keys in queries]),
        "sink": sink,
        "local": local,
        "recent": mean([sum(w for k, w in keys.items() if k > q - math.ceil((q + 1) / 10)) for q, keys in queries]),
        "far": max(0.0, 1 - sink - local),
        "uniformity": mean(
            [sum(w * math.log(max(w, 1e-10) * (q + 1)) for w in keys.values()) for q, keys in queries if q > 0]
        ),
        "distances": [mean([keys.get(q - d, 0.0) for q, keys in queries]) for d in range(64)],
    }


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3", "gpt2"])
@pytest.mark.parametrize("block", [7, 128])
def test_statistics_are_those_of_loops_over_the_stock_models_attention(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_statistics, "BLOCK", block)
    pair, stock = tiny.pair(name), tiny.build(name)
    stock.set_attn_implementation("eager")
    chunks = [tiny.tokens(90, seed=1), tiny.tokens(31, seed=2)]
    with torch.inference_mode():
        outs = [stock(torch.tensor([c]), use_cache=False, output_attentions=True).attentions for c in chunks]
    got = measure(pair.model, pair.facts, chunks)
    assert [len(layer) for layer in got] == [4, 4]
    for layer, heads in enumerate(got):
        for head, one in enumerate(heads):
            expected = by_loops([out[layer][0, head].double().tolist() for out in outs])
            assert (one.layer, one.head) == (layer, head)
            for field in NAMES:
                assert getattr(one, field) == pytest.approx(expected[field], abs=2e-5), field
            assert one.distances == pytest.approx(expected["distances"], abs=2e-6)


def test_a_layer_with_a_sliding_window_is_compared_with_uniform_attention_over_what_it_sees() -> None:
    model = tiny.build("mistral_sliding")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # all logits equal: uniform attention
    facts = wrap(model, FULL)
    for layer in measure(model, facts, [tiny.tokens(80)]):
        for head in layer:
            assert head.uniformity == pytest.approx(0, abs=1e-5)
            assert head.distances[24:] == pytest.approx([0.0] * 40, abs=1e-7)


def test_no_tensor_of_all_heads_queries_and_keys_ever_exists() -> None:
    pair, n = tiny.pair("llama"), 480
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    with Watch():
        measure(pair.model, pair.facts, [tiny.tokens(n)])
    assert 0 < largest <= 4 * head_statistics.BLOCK * n + 4 * 64 * 128 < 4 * n * n


# --- the classifier -------------------------------------------------------------------------------------------------


def from_rows(rows: torch.Tensor) -> HeadStatistics:
    """Statistics of one head whose causal attention rows [n, n] are given."""
    sums = LayerSums(1, 1)
    n = len(rows)
    sums._add_weights(rows[None].float(), torch.ones(n, n).tril().bool(), 0)
    return sums.statistics(0)[0]


def rows_at(distances: dict[int, float], n: int = 200) -> torch.Tensor:
    """Every query gives these shares to the keys so far back; what would fall before the start goes to key 0."""
    rows = torch.zeros(n, n)
    for q in range(n):
        for distance, share in distances.items():
            rows[q, max(0, q - distance)] += share
    return rows


UNIFORM = torch.ones(200, 200).tril() / torch.arange(1, 201)[:, None]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (rows_at({1: 1.0}), ("positional", 8)),
        (rows_at({0: 0.1, 7: 0.65, 12: 0.25}), ("positional", 16)),  # over 0.8 only at distance 12: 12 + 4
        (rows_at({0: 0.7, 30: 0.3}), ("positional", 16)),  # never over 0.8 within 16 distances
        (rows_at({500: 0.9, 0: 0.1}), ("positional", 8)),  # on the first token: "positional" by its sink
        (rows_at({60: 0.9, 90: 0.1}), ("positional", 8)),  # early queries make a sink of it
        (rows_at({d: 1 / 8 for d in range(20, 36, 2)}), ("mixed", 64)),
        (rows_at({d: 1 / 60 for d in range(1, 61)}), ("gathering", -1)),
        (UNIFORM, ("dead", 1)),  # the original's quirk: a head that averages over everything is called dead
    ],
)
def test_types_and_windows_of_hand_made_heads(rows: torch.Tensor, expected: tuple[str, int]) -> None:
    head = classify(from_rows(rows), Thresholds())
    assert (head.type, head.window) == expected
    assert 0 <= head.confidence <= 1


def stats(**values: float) -> HeadStatistics:
    return HeadStatistics(0, 0, **{"uniformity": 2.0, "distances": [0.3, 0.3, 0.3, 0.05], **values})


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (stats(uniformity=0.025, entropy=0.1), Head("dead", 0.75, 1)),  # the first rule wins
        (stats(entropy=0.75, local=0.9), Head("positional", 0.75, 8)),
        (stats(entropy=0.1, local=0.95), Head("positional", 1.0, 8)),
        (stats(entropy=1.2, local=0.5, sink=0.45), Head("positional", 0.45, 8)),
        (stats(entropy=1.2, local=0.5, sink=0.2), Head("mixed", 0.5, 64)),
        (stats(entropy=2.2, local=0.9, sink=0.9), Head("mixed", 0.5, 64)),
        (stats(entropy=3.5), Head("gathering", 0.25, -1)),
        (stats(entropy=6.0), Head("gathering", 1.0, -1)),
    ],
)
def test_confidences_are_the_originals(head: HeadStatistics, expected: Head) -> None:
    got = classify(head, Thresholds())
    assert (got.type, got.window) == (expected.type, expected.window)
    assert got.confidence == pytest.approx(expected.confidence)


def test_thresholds_are_arguments() -> None:
    head = stats(entropy=2.2, local=0.5)
    assert classify(head, Thresholds(high_entropy=2.0)).type == "gathering"
    assert classify(head, Thresholds(low_entropy=2.5, high_local=0.4)).type == "positional"
    assert classify(head, Thresholds(mixed_window=17)).window == 17
    with pytest.raises(UserError, match="positional and gathering at once"):
        Thresholds(low_entropy=4.0)


# --- the profile ----------------------------------------------------------------------------------------------------


def profile() -> HeadProfile:
    heads = ((Head("positional", 0.9, 8), Head("mixed", 0.5, 64)), (Head("gathering", 0.25, -1), Head("dead", 1.0, 1)))
    return HeadProfile("a/model", 1, {"low_entropy": 1.5}, {"tokens": 100}, heads)


def test_a_profile_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "head_profile.json"
    profile().save(path)
    loaded = head_profile.load(path)
    assert loaded == profile() and len(loaded.sha256) == 64
    assert loaded.counts() == {"positional": 1, "mixed": 1, "gathering": 1, "dead": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format: input should be"),
        ({"num_layers": 3}, "not as many as it says"),
        ({"num_heads": 3}, "do not all have num_heads"),
        ({"num_kv_heads": 3}, "do not divide"),
        ({"heads": [[{"type": "lazy", "confidence": 0.5, "window": 8}] * 2] * 2}, "heads.0.0.type: input should be"),
        ({"heads": [[{"type": "mixed", "confidence": 0.5, "window": 0}] * 2] * 2}, "window below 1"),
        ({"heads": [[{"type": "mixed"}] * 2] * 2}, "heads.0.0.confidence: field required"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "head_profile.json"
    profile().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        head_profile.load(path)


def test_stock_models_are_left_as_they_were() -> None:
    pair = tiny.pair("llama")
    row = torch.tensor([tiny.tokens(20)])
    measure(pair.model, pair.facts, [tiny.tokens(20)])
    with torch.inference_mode():
        expected = pair.stock(row, **tiny.given(tf.DynamicCache(config=pair.stock.config))).logits
        got = pair.model(row, **tiny.given(pair.cache(method="full"))).logits
    assert (got - expected).abs().max() <= 1e-4
