"""CriticalKV against plain loops in float64: around several scorers, heads alike and unlike, and what it refuses."""

from __future__ import annotations

import pytest
import tiny
import torch
from methods.plain import LENGTHS, NAMES, Layer, choose, compare, layers, pooled
from methods.test_every_layer import shared
from methods.test_kept_sets import held_by

from kv_lm_eval.cache.output import matrix_of, output_norms
from kv_lm_eval.engine import outputs, sharded
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.base import View

INF, WINDOW, CAPACITY = float("inf"), 4, 16
CRITICAL = {"method": "criticalkv", "max_capacity_prompt": CAPACITY}
SNAPKV = {**CRITICAL, "window_size": WINDOW, "kernel_size": 3}


def snapkv(layer: Layer, kv_head: int) -> list[float]:
    """The scores of snapkv with a window of 4 and max pooling over 3."""
    n, group = layer.n, layer.group(kv_head)
    votes = [
        sum(layer.weights[h][q][t] for h in group for q in range(n - WINDOW, n)) / len(group) for t in range(n - WINDOW)
    ]
    return pooled(votes, 3, "max") + [INF] * WINDOW


def h2o(layer: Layer, kv_head: int) -> list[float]:
    n, group = layer.n, layer.group(kv_head)
    mass = [sum(layer.weights[h][q][t] for h in group for q in range(n)) / len(group) for t in range(n)]
    return mass[: n - CAPACITY // 2] + [INF] * (CAPACITY // 2)


def tova(layer: Layer, kv_head: int) -> list[float]:
    n, heads = layer.n, range(len(layer.weights))
    return [sum(layer.weights[h][n - 1][t] for h in heads) / len(heads) for t in range(n)]


def critical(layer: Layer, kv_head: int, scores: list[float], slots: int, ratio: float, epsilon: float) -> set[int]:
    """The two stages for one head."""
    slots = min(slots, layer.n)
    first = choose(scores, int(slots * ratio)) | {t for t, s in enumerate(scores) if s == INF}
    second = [INF if t in first else (s + epsilon) * layer.projected(kv_head, t) for t, s in enumerate(scores)]
    return choose(second, slots)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("score", "settings"),
    [
        (snapkv, SNAPKV),
        (snapkv, {**SNAPKV, "first_stage_ratio": 0.8}),
        (snapkv, {**SNAPKV, "first_stage_ratio": 0}),
        (snapkv, {**SNAPKV, "norm_epsilon": 0.05}),
        (h2o, {**CRITICAL, "scorer": "h2o"}),
        (tova, {**CRITICAL, "scorer": "tova"}),
    ],
    ids=["snapkv", "most by the scorer", "none by the scorer", "epsilon", "h2o", "tova"],
)
def test_both_stages_around_a_scorer_in_a_padded_batch(name, score, settings):
    ratio, epsilon = settings.get("first_stage_ratio", 0.5), settings.get("norm_epsilon", 1e-4)

    def reference(layer: Layer) -> list[set[int]]:
        return [critical(layer, k, score(layer, k), CAPACITY, ratio, epsilon) for k in layer.kv_heads]

    compare(name, settings, reference)


def test_the_settings_of_the_stages_show():
    """What the loops above tell apart: each variant keeps something else somewhere."""
    heads = [
        (x, k, snapkv(x, k)) for n in LENGTHS for x in layers("llama", tuple(tiny.tokens(n, seed=n))) for k in (0, 1)
    ]
    variants = [(0.5, 1e-4), (0.8, 1e-4), (0, 1e-4), (0.5, 0.05), (1, 0)]
    kept = {str([sorted(critical(*head, CAPACITY, *v)) for head in heads]) for v in variants}
    assert len(kept) == len(variants)


@pytest.mark.parametrize("name", NAMES)
def test_with_ada_heads_share_by_the_scorers_own_scores(name):
    def reference(layer: Layer) -> list[set[int]]:
        scores = [snapkv(layer, k) for k in layer.kv_heads]
        ranked = sorted((-s, k, t) for k in layer.kv_heads for t, s in enumerate(scores[k]))
        chosen = [k for _, k, _ in ranked[: CAPACITY * len(scores)]]
        slots = shared([chosen.count(k) for k in layer.kv_heads], CAPACITY, "0.2", layer.n)
        return [critical(layer, k, scores[k], slots[k], 0.5, 1e-4) for k in layer.kv_heads]

    compare(name, {**SNAPKV, "head_budget": "ada"}, reference)


def test_it_goes_with_pyramids_later_cuts_and_treatments_of_the_rest():
    pair, rows = tiny.pair("llama"), [tiny.tokens(n, seed=n) for n in LENGTHS]
    for more in (
        {"layer_budget": "pyramid"},
        {"compress_every": 3},
        {"compress_every": 3, "evicted": "compensate", "block_size": 5},
        {"scorer": "h2o", "compress_every": 1},
    ):
        cache = pair.cache(**({**SNAPKV, **more} if "scorer" not in more else {**CRITICAL, **more}))
        tiny.forward(pair.model, cache, rows)
        for t in range(7):
            tiny.forward(pair.model, cache, [[3 + t]] * 3, starts=[n + t for n in LENGTHS])
        held = [sum(held[row] for held in cache.held) / 2 for row in range(3)]
        left = 7 % more.get("compress_every", 8)
        assert held == [CAPACITY + left] * 3, more


def test_a_later_cut_keeps_the_second_stage_of_what_is_left():
    """After the prompt the rest is a prompt of its own, of which the stock model sees the kept tokens only."""
    pair, row = tiny.pair("llama"), tiny.tokens(30, seed=30)
    cache = pair.cache(**{**SNAPKV, "compress_every": 2})
    tiny.forward(pair.model, cache, [row])
    before = held_by(cache)
    seen = []
    rescore = type(cache.compression.method).rescore

    def noted(self, view, scores, counts):
        again = rescore(self, view, scores, counts)
        seen.append((view.pos.clone(), scores.clone(), again.clone(), view.output_norms(), counts))
        return again

    type(cache.compression.method).rescore = noted
    try:
        tiny.forward(pair.model, cache, [[5, 6]], starts=[30])
    finally:
        type(cache.compression.method).rescore = rescore
    for layer, (pos, scores, again, norms, counts) in enumerate(seen):
        assert counts.unique().tolist() == [CAPACITY]
        for head, kept in enumerate(held_by(cache)[layer]):
            at = pos[0, head].tolist()
            assert set(at) == before[layer][head] | {30, 31}
            first = choose(scores[0, head].tolist(), CAPACITY // 2)
            values = [
                INF if t in first or s == INF else (s + 1e-4) * norms[0, head, t].item()
                for t, s in enumerate(scores[0, head].tolist())
            ]
            assert {at[t] for t in choose(values, CAPACITY)} == kept
            assert again[0, head].isposinf().sum() >= CAPACITY // 2


def test_what_the_scorer_protects_stays_though_its_value_is_made_nothing_by_the_projection():
    scores, norms = torch.tensor([[[INF, 2.0, 1.0, INF]]]), torch.tensor([[[1.0, 1.0, 5.0, 0.0]]])
    method = tiny.compression(**SNAPKV).method
    x = torch.zeros(1, 1, 4, 2)
    view = View(x, x, torch.arange(4).view(1, 1, 4), [4], [3], 0, 1, None, lambda last: x, _output_norms=lambda: norms)
    got = method.rescore(view, scores, torch.tensor([[3]]))
    assert got[0, 0].tolist() == [INF, pytest.approx(2.0001), pytest.approx(5.0005), INF]


# --- values behind the projection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("block", [2**24, 7 * 32])
def test_norms_are_those_of_each_query_heads_part_of_the_projection(name, block, monkeypatch):
    monkeypatch.setattr("kv_lm_eval.cache.output.ELEMENTS", block)
    pair = tiny.pair(name)
    cache = pair.cache(method="full")
    tiny.forward(pair.model, cache, [tiny.tokens(20), tiny.tokens(11)])
    for layer, module in pair.facts.outputs.items():
        heads, kv_heads = pair.facts.heads[layer]
        values = cache.stores[layer].values
        got = output_norms(pair.facts, layer, values)
        size = values.shape[3]
        for head in range(kv_heads):
            total = torch.zeros(values.shape[0], values.shape[2])
            for own in range(head * heads // kv_heads, (head + 1) * heads // kv_heads):
                whole = torch.zeros(*values.shape[:1], values.shape[2], heads * size)
                whole[..., own * size : (own + 1) * size] = values[:, head]
                bias = module(torch.zeros(1, heads * size))
                total += (module(whole) - bias).abs().sum(-1)
            assert torch.allclose(got[:, head], total / (heads // kv_heads), rtol=1e-4)


def test_a_projection_of_any_form_is_read_by_what_it_does():
    plain = torch.nn.Linear(6, 4)

    class Packed(torch.nn.Linear):
        """As quantised layers are: a subclass whose weight is not the matrix."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return plain(x)

    with torch.no_grad():
        for module in (plain, Packed(6, 4)):
            assert torch.allclose(matrix_of(module, 6, torch.zeros(1)), plain.weight.T, atol=1e-6)


def test_a_model_whose_attention_goes_through_something_else_first_is_refused():
    pair = tiny.pair("llama")
    facts = type(pair.facts)(**{**vars(pair.facts), "outputs": {0: pair.facts.outputs[0]}})
    with pytest.raises(UserError, match=r"method=criticalkv on X: .* attention in layer 1 .* not|nothing that is one"):
        outputs.check(facts, "X", "criticalkv")
    facts.outputs = pair.facts.outputs
    outputs.check(facts, "X", "criticalkv")
    with pytest.raises(UserError, match="2 ranks"):
        sharded.check(tiny.compression(**SNAPKV), 2)


def test_what_is_not_one_matrix_is_not_taken_for_the_projection():
    model = tiny.build("llama")

    class Normed(torch.nn.Module):
        """A norm before the projection."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.nn.functional.normalize(x, dim=-1))

    attention = model.model.layers[1].self_attn
    attention.o_proj = Normed(attention.o_proj)
    with pytest.raises(UserError, match="method=criticalkv on LlamaForCausalLM: .* layer 1 .*LlamaAttention"):
        tiny.wrap(model, tiny.compression(**SNAPKV))
    assert tiny.wrap(model, tiny.compression(method="full")).outputs.keys() == {0}


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scorer": "window"}, "by their place"),
        ({"scorer": "head_aware"}, "by their place"),
        ({"scorer": "full"}, "evicts nothing"),
        ({"scorer": "criticalkv"}, "this method itself"),
        ({"scorer": "snapkw"}, "scorer=snapkw: not known; did you mean|scorer=snapkw: not known"),
        ({"first_stage_ratio": 1.5}, r"outside \[0, 1\]"),
        ({"norm_epsilon": -1}, "is negative"),
        ({"scorer": "tova", "head_budget": "ada"}, "head_budget=ada has no effect"),
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        tiny.compression(**CRITICAL, **settings)
    assert "\n" not in str(caught.value)


def test_scorers_with_negative_scores_are_refused_at_the_first_prompt():
    pair = tiny.pair("llama")
    with pytest.raises(UserError, match="scorer=knorm: it gives negative scores"):
        tiny.forward(pair.model, pair.cache(**CRITICAL, scorer="knorm"), [tiny.tokens(30)])


def test_the_scorers_settings_schedule_and_source_are_its_own(tmp_path):
    settings = tiny.compression(**CRITICAL, scorer="h2o", compress_every=2).settings()
    assert settings["method"] == "criticalkv" and settings["scorer"] == "h2o" and "window_size" in settings
    assert tiny.compression(**CRITICAL, scorer="h2o").schedule.compress_every == 1
    path = tmp_path / "mine.py"
    path.write_text(
        "from kv_lm_eval.methods.base import Method\n\n\nclass Mine(Method):\n    def score(self, view):\n"
        "        return view.values.norm(dim=-1)\n"
    )
    assert "sha256=" in tiny.compression(**CRITICAL, scorer=str(path)).settings()["method_source"]
