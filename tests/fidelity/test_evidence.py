"""Tokens of an answer that repeat what the prompt says, and whether the pairs that they are read from are held."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from fidelity.test_answers import numbers

from kv_lm_eval.engine.fidelity import share_kept
from kv_lm_eval.engine.prefill import prefill
from kv_lm_eval.requests import kept_answers
from kv_lm_eval.requests.beside import Beside
from kv_lm_eval.requests.evidence import Piece, pieces
from kv_lm_eval.requests.samples import Text
from kv_lm_eval.requests.verdicts import Found

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = "xx 417 yy. What is it? 417"


def found(doc: dict, answer: str, fed: int = len(PROMPT)) -> list[Piece]:
    """With a token for each character."""
    return pieces(
        PROMPT, doc, fed, lambda text, at: len(text) - at, [*map(ord, answer)], lambda ids: "".join(map(chr, ids))
    )


def test_what_an_answer_repeats_is_found_in_both_by_token() -> None:
    doc = {"expected": ["417"], "question": "What is it?"}
    assert found(doc, "a 417.") == [Piece(2, 5, (3, 4, 5))]
    assert found(doc, "a 417.", len(PROMPT) - 2) == [Piece(2, 5, (1, 2, 3))]  # the prompt lost its beginning
    assert found(doc, "a 417.", len(PROMPT) - 5) == []
    assert found({"answer": "417"}, "417") == [
        Piece(0, 3, (3, 4, 5, len(PROMPT) - 3, len(PROMPT) - 2, len(PROMPT) - 1))
    ]
    for other in ({**doc, "expected": ["999"]}, {**doc, "expected": []}, {}, {**doc, "expected": ["x"]}):
        assert found(other, "417") == []
    assert found(doc, "no") == []


@pytest.mark.parametrize(
    "settings", [{"method": "knorm"}, {"method": "snapkv", "window_size": 4, "head_budget": "ada"}]
)
def test_the_share_is_counted_pair_by_pair(settings: dict) -> None:
    pair = tiny.pair("llama")
    rows = [tiny.tokens(40, seed=1), tiny.tokens(33, seed=2)]
    cache, _ = prefill(pair.model, lambda: pair.cache(max_capacity_prompt=12, **settings), rows)
    for row in range(2):
        places = [3, 9, 20, 30]
        shares = [
            np.mean([place in head for place in places]) for layer in range(2) for head in tiny.kept(cache, layer, row)
        ]
        assert share_kept(cache, row, places) == pytest.approx(np.mean(shares)) and 0 < np.mean(shares) < 1


def test_what_is_far_from_the_end_is_evicted_by_a_window_and_costs_more(run) -> None:
    results = run(
        "kv_needle_magic", metadata={"lengths": [256], "depths": [10, 100], "samples_per_cell": 4}, fidelity=True,
        method="streaming_llm", n_sink=4, window_size=100,
    )  # fmt: skip
    shares: dict[float, list[float]] = {10.0: [], 100.0: []}
    kl: list[float] = []
    for sample in results["samples"]["kv_needle_magic"]:
        (one,) = sample["fidelity"]
        for start, stop, kept in one.get("evidence", []):
            shares[sample["doc"]["document_depth_percent"]].append(kept)
            if not kept:
                kl += one["kl"][start:stop]
    assert set(shares[10.0]) == {0.0} and set(shares[100.0]) == {1.0}
    told = results["fidelity"]["kv_needle_magic"]["by_evidence"]
    assert told["kept"]["facts"] == len(shares[100.0]) and told["evicted"]["kept_share"] == 0
    assert told["evicted"]["mean"] == pytest.approx(np.mean(kl), rel=1e-3) and told["evicted"]["tokens"] == len(kl)
    assert told["evicted"]["mean"] > 100 * told["kept"]["mean"]
    assert sum(told[name]["tokens"] for name in told) == results["fidelity"]["kv_needle_magic"]["along_base"]["tokens"]


def test_it_is_kept_with_the_answer_and_summed_up_by_half() -> None:
    ids = np.arange(6, dtype=np.int32)
    one = Beside("b", numbers(6), numbers(6), ids, ids, evidence=[(0, 2, 0.75), (4, 5, 0.25)])
    again = kept_answers.decode(kept_answers.encode(Text("a", beside=one)), "here").beside
    assert again.evidence == [(0, 2, 0.75), (4, 5, 0.25)]
    told = Found("generate_until", [one], [0]).summary()["by_evidence"]
    kl = one.along_base.kl
    assert told["kept"]["mean"] == pytest.approx(kl[:2].mean()) and told["evicted"]["mean"] == pytest.approx(kl[4])
    assert told["other"]["mean"] == pytest.approx(kl[[2, 3, 5]].mean()) and told["kept"]["facts"] == 1
    assert "by_evidence" not in Found("generate_until", [Beside("b", numbers(6), numbers(6), ids, ids)], [0]).summary()
