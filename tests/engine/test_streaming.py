"""Documents streamed in segments give the numbers of the loop over single tokens, for every method."""

from __future__ import annotations

import pytest
import tiny
import torch

from kv_lm_eval.engine import streaming
from kv_lm_eval.engine.streaming import Stream, score_documents

PREFIX = 5
METHODS = {
    **{name: tiny.free(name, 14) for name in tiny.methods(lambda c: c.uses_cache and c.takes_budget and not c.ring)},
    "knorm ratio": {"method": "knorm", "keep_ratio": 0.5},
    "streaming_llm in_cache": {"method": "streaming_llm", "n_sink": 2, "window_size": 12},
}


def scored(pair: tiny.Pair, documents: list[list[int]], every: int, **settings: object) -> list[torch.Tensor]:
    documents_scored, _ = score_documents(pair.model, lambda: pair.cache(**settings), documents, Stream(PREFIX, every))
    return [document.log_probs for document in documents_scored]


def token_loop(pair: tiny.Pair, document: list[int], every: int, **settings: object) -> torch.Tensor:
    """One token a forward, the prefix included. A cut is forced after every `every`-th; for sinks and windows, whenever
    `every` slots more than the 14 of METHODS are held."""
    cache = pair.cache(**settings, **({"compress_every": every} if settings["method"] != "full" else {}))
    out, held = [], 0
    for i, (token, target) in enumerate(zip([PREFIX, *document[:-1]], document, strict=True)):
        held += 1
        due = held == 14 + every if settings["method"] == "streaming_llm" else (i + 1) % every == 0
        cache.set(mode="prefill" if due else "hold", prefill_end=None)
        logits = tiny.forward(pair.model, cache, [[token]], starts=[i])[0, -1]
        out.append(logits.log_softmax(-1)[target])
        held = 14 if due else held
    return torch.stack(out)


CASES = [(*case, every) for case in tiny.cases(METHODS, ["llama"]) for every in (1, 4, 7)] + [
    (*case, 4) for case in tiny.cases(METHODS, [n for n in tiny.CORE if n != "llama"])
]


@pytest.mark.parametrize(("name", "method", "every"), CASES)
def test_segments_and_batches_equal_the_loop_over_single_tokens(name: str, method: str, every: int) -> None:
    pair = tiny.pair(name)
    documents = [tiny.tokens(n, seed=n) for n in (47, 28, 13, 1)]
    together = scored(pair, documents, every, **METHODS[method])
    for document, got in zip(documents, together, strict=True):
        assert len(got) == len(document)
        assert (got - token_loop(pair, document, every, **METHODS[method])).abs().max() <= 1e-4
        (alone,) = scored(pair, [document], every, **METHODS[method])
        assert (got - alone).abs().max() <= 1e-4


def test_a_document_under_the_full_cache_scores_as_in_one_stock_forward() -> None:
    pair, document = tiny.pair("llama"), tiny.tokens(150)
    with torch.inference_mode():
        logits = pair.stock(input_ids=torch.tensor([[PREFIX, *document[:-1]]])).logits[0]
    expected = logits.log_softmax(-1)[torch.arange(150), document]
    assert (scored(pair, [document], 64, method="full")[0] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["snapkv", "h2o", "streaming_llm in_cache"])
def test_segments_cut_short_to_bound_the_logits_are_held_until_the_next_cut(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "LOGIT_ELEMENTS", 1)  # at most 64 tokens in one forward
    pair, document = tiny.pair("llama"), tiny.tokens(180)
    (got,) = scored(pair, [document], 85, **METHODS[method])
    assert (got - token_loop(pair, document, 85, **METHODS[method])).abs().max() <= 1e-4


def test_progress_counts_every_scored_token_once_and_the_cache_has_seen_them() -> None:
    pair, steps = tiny.pair("llama"), []
    settings = METHODS["window"]
    documents = [tiny.tokens(47), tiny.tokens(20)]
    _, cache = score_documents(
        pair.model, lambda: pair.cache(**settings), documents, Stream(PREFIX, 4), progress=steps.append
    )
    assert sum(steps) == 67
    assert cache.seen == [47, 20]
    assert max(cache.peaks) <= 14 + 4


def test_an_empty_document_has_no_scores_and_disturbs_no_other() -> None:
    pair = tiny.pair("llama")
    document = tiny.tokens(30)
    empty, got = scored(pair, [[], document], 4, **METHODS["h2o"])
    assert empty.numel() == 0
    assert (got - scored(pair, [document], 4, **METHODS["h2o"])[0]).abs().max() <= 1e-4
