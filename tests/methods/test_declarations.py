"""A scorer that reads what it does not declare is told what to declare, in one line; so is one of another shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from kv_lm_eval.errors import UserError

SCORER = """
import torch
from kv_lm_eval.methods.base import Method

class Mine(Method):
{declared}
    def score(self, view):
        {score}
"""
READS = {  # what score() does, what is missing, and what the message must name
    "attention": ("return view.attention(4).sum((2, 3))", "", ["view.attention(4)", "num_queries", "returns 4"]),
    "more attention than declared": (
        "return view.attention(4).sum((2, 3))",
        "    num_queries = 2",
        ["last 4 queries", "keeps 2", "num_queries"],
    ),
    "mass": ("return view.mass", "", ["view.mass", "accumulates = True"]),
    "moments": ("return view.moments.mean", "", ["view.moments", "moments_from"]),
    "rotate": ("return view.rotate(view.keys, -view.pos).sum(-1)", "", ["view.rotate", "moments_from"]),
    "queries": (
        "return view.queries(4)[0].sum((2, 3, 4))[..., None] * view.keys[..., 0]",
        "",
        ["view.queries(4)", "num_queries"],
    ),
    "more queries than declared": (
        "return view.queries(4)[0].sum((2, 3, 4))[..., None] * view.keys[..., 0]",
        "    num_queries = 2",
        ["view.queries(4)", "keeps 2", "returns 4"],
    ),
    "outputs": (
        "return view.outputs(4).sum((2, 3, 4))[..., None] * view.keys[..., 0]",
        "",
        ["num_queries", "returns 4"],
    ),
    "norms of projected values": ("return view.output_norms()", "", ["view.output_norms", "projects = True"]),
    "hidden states": ("return view.hidden.sum(-1)[:, None]", "", ["view.hidden", "reads_hidden = True", "note(view)"]),
    "hidden states at a cut": (
        "return view.hidden.sum(-1)[:, None]",
        "    reads_hidden = True\n    def note(self, view):\n        return view.keys[..., 0]",
        ["view.hidden", "view.remembered"],
    ),
    "noted shape": (
        "return view.remembered",
        "    reads_hidden = True\n    def note(self, view):\n        return view.hidden.sum(-1)",
        ["noted", "[1, 40]", "[1, 2, 40]"],
    ),
    "shape": ("return view.keys.sum(-1)[:, 0]", "", ["shape [1, 40]", "[1, 2, 40]", "[1, 1, 40]"]),
    "number of heads": ("return view.keys.sum(-1).repeat(1, 2, 1)", "", ["shape [1, 4, 40]"]),
    "not a number": ("return view.keys.sum(-1) / 0 * 0", "", ["NaN", "layer 0"]),
}


def run(folder: Path, score: str, declared: str) -> None:
    path = folder / "mine.py"
    path.write_text(SCORER.format(score=score, declared=declared))
    pair = tiny.pair("llama")
    cache = pair.cache(method=str(path), max_capacity_prompt=12)
    tiny.forward(pair.model, cache, [tiny.tokens(40)])


@pytest.mark.parametrize("case", READS)
def test_what_a_scorer_reads_without_declaring_it_is_named(case: str, tmp_path: Path) -> None:
    score, declared, words = READS[case]
    with pytest.raises(UserError) as caught:
        run(tmp_path, score, declared)
    assert all(word in str(caught.value) for word in ["method=mine", *words]), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("score", "declared"),
    [
        ("return view.attention(4).sum((2, 3))", "    num_queries = 4"),
        ("return view.attention(2).sum((2, 3))", "    num_queries = 4"),
        ("return view.mass", "    accumulates = True"),
        ("return view.rotate(view.keys, -view.pos).sum(-1)", "    moments_from = 0"),
        ("return view.rotate(view.keys, -view.pos).sum(-1)", "    rotates = True"),
        ("return view.output_norms()", "    projects = True"),
        ("return view.queries(4)[0].sum((2, 3, 4))[..., None] * view.keys[..., 0]", "    num_queries = 4"),
        ("return view.outputs(3).sum((2, 3, 4))[..., None] * view.keys[..., 0]", "    num_queries = 4"),
    ],
)
def test_what_is_declared_is_there(score: str, declared: str, tmp_path: Path) -> None:
    run(tmp_path, score, declared)


def test_a_score_of_an_empty_slot_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        SCORER.format(
            declared="",
            score="return view.keys.sum(-1).masked_fill(view.pos < 0, float('nan')).expand_as(view.keys[..., 0])",
        )
    )
    pair = tiny.pair("llama")
    cache = pair.cache(method=str(path), max_capacity_prompt=12)
    tiny.forward(pair.model, cache, [tiny.tokens(40), tiny.tokens(3), tiny.tokens(20)])
    assert cache.held == [[12, 3, 12]] * 2


def test_queries_and_what_they_read_are_those_of_the_stock_model(tmp_path: Path) -> None:
    from methods.plain import layers

    path, seen = tmp_path / "mine.py", []
    path.write_text(SCORER.format(declared="    num_queries = 5", score="return view.keys[..., 0]"))
    pair, rows = tiny.pair("llama"), [tiny.tokens(40), tiny.tokens(3)]
    cache = pair.cache(method=str(path), max_capacity_prompt=12)
    method = type(cache.compression.method)
    method.score = lambda self, view: (
        seen.append((view.queries(4), view.queries(), view.outputs(5))) or view.keys[..., 0]
    )
    tiny.forward(pair.model, cache, rows)
    for layer, ((few, few_pos), (queries, pos), out) in zip(layers("llama", tuple(rows[0])), seen, strict=True):
        wanted = torch.tensor(layer.queries).float()
        assert few.shape == (1, 2, 2, 4, 8) and few_pos.tolist() == [[36, 37, 38, 39]]
        assert queries.shape == (1, 2, 2, 5, 8) and pos.tolist() == [[35, 36, 37, 38, 39]]
        assert torch.allclose(queries[0].flatten(0, 1), wanted[:, 35:], atol=1e-4)
        read = torch.tensor(layer.weights) @ torch.tensor(layer.values).repeat_interleave(2, 0)
        assert torch.allclose(out[0].flatten(0, 1), read[:, 35:].float(), atol=1e-4)


def test_all_queries_since_the_last_cut_and_what_was_remembered_are_there(tmp_path: Path) -> None:
    path, seen = tmp_path / "mine.py", []
    declared = "    num_queries = 5\n    every_query = True"
    path.write_text(SCORER.format(declared=declared, score="return view.keys[..., 0]"))
    pair = tiny.pair("llama")
    cache = pair.cache(method=str(path), max_capacity_prompt=12, compress_every=3)

    def score(self, view):
        before = None if view.remembered is None else view.remembered.clone()
        seen.append((view.layer, view.queries()[1].tolist(), before, view.pos.clone()))
        view.remember(view.pos.expand(view.keys.shape[:3]).float() + 1)
        return view.keys[..., 0]

    type(cache.compression.method).score = score
    tiny.forward(pair.model, cache, [tiny.tokens(40)])
    for t in range(6):
        tiny.forward(pair.model, cache, [[3 + t]], starts=[40 + t])
    at = [(queries, remembered, pos) for layer, queries, remembered, pos in seen if layer == 1]
    assert [queries for queries, _, _ in at] == [[[*range(40)]], [[*range(35, 43)]], [[*range(38, 46)]]]
    assert at[0][1] is None
    for _, remembered, pos in at[1:]:
        old = pos < pos.max() - 2
        assert torch.equal(remembered, torch.where(old, pos + 1, 0).expand_as(remembered).float())


def test_hidden_states_are_those_of_the_new_tokens_and_what_is_noted_of_them_stays_with_their_slots(
    tmp_path: Path,
) -> None:
    path, seen = tmp_path / "mine.py", []
    path.write_text(SCORER.format(declared="    reads_hidden = True", score="return view.remembered"))
    pair, row = tiny.pair("llama"), tiny.tokens(40)
    cache = pair.cache(method=str(path), max_capacity_prompt=12, compress_every=3)

    def note(self, view):
        seen.append((view.layer, view.hidden.clone()))
        return view.hidden.sum(-1)[:, None].expand(-1, view.keys.shape[1], -1)

    type(cache.compression.method).note = note
    found: list[torch.Tensor] = []
    norm = pair.model.model.layers[1].input_layernorm.register_forward_hook(lambda _m, _a, out: found.append(out[0]))
    try:
        tiny.forward(pair.model, cache, [row])
        for t in range(4):
            tiny.forward(pair.model, cache, [[3 + t]], starts=[40 + t])
    finally:
        norm.remove()
    mine = [hidden[0] for layer, hidden in seen if layer == 1]
    assert [x.shape[0] for x in mine] == [40, 1, 1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(mine, found, strict=True))
    sums = torch.cat(mine).sum(-1)
    store = cache.stores[1]
    assert torch.allclose(store.mass[0], sums[store.pos[0].long()].expand_as(store.mass[0]))
