"""A fresh forward for every token, against the loop that does just that with the stock model."""

from __future__ import annotations

import pytest
import tiny
import torch

from kv_lm_eval.engine.lent import see_last, without_cache
from kv_lm_eval.engine.recompute import score_recomputed
from kv_lm_eval.engine.windows import Plain


@torch.inference_mode()
def next_logits(model: torch.nn.Module, tokens: list[int], length: int) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens[-length:]])).logits[0, -1]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("length", [1, 7, 30, 200])
def test_continuations_are_scored_from_the_tokens_just_before_each(name: str, length: int) -> None:
    stock = tiny.pair(name).stock
    contexts = [tiny.tokens(n, seed=n) for n in (25, 6, 1)]
    continuations = [tiny.tokens(n, seed=n + 50) for n in (12, 1, 40)]
    got = score_recomputed(
        Plain(lambda ids, last: stock(ids).logits[:, -last:], 4, "cpu"), contexts, continuations, length
    )
    for context, continuation, (score, greedy) in zip(contexts, continuations, got, strict=True):
        row, total, likely = list(context), 0.0, True
        for token in continuation:
            logits = next_logits(stock, row, length)
            total += float(logits.log_softmax(-1)[token])
            likely = likely and int(logits.argmax()) == token
            row.append(token)
        assert abs(score - total) <= 1e-3
        assert greedy == likely


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_sees_the_last_tokens_only_in_a_padded_batch(name: str) -> None:
    model, length = tiny.build(name), 9
    rows = [tiny.tokens(n, seed=n) for n in (20, 13, 4)]
    ids, mask, _ = tiny.left_padded(rows)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with without_cache(model), see_last(model, length):
        got = model.generate(ids, attention_mask=mask, **asked)
    for b, row in enumerate(rows):
        expected = list(row)
        for _ in range(8):
            expected.append(int(next_logits(tiny.pair(name).stock, expected, length).argmax()))
        assert got[b, -8:].tolist() == expected[-8:]
