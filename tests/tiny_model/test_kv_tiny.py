"""What the embedded model promises: it is small, loads with stock transformers, and answers from its context only."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kv_lm_eval import tiny
from kv_lm_eval.tiny import episodes

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny.path(), dtype=torch.float32).eval()


def prompt_and_value(tokenizer, length: int, depth: float, seed: int) -> tuple[list[int], str]:
    def count(text: str) -> int:
        return len(tokenizer(" " + text).input_ids)

    draw = episodes.Draw(seed)
    needles = episodes.needles(draw, 4)
    filler = episodes.take(episodes.grammar_sentences(draw), length - 100, count)
    depths = [depth, *(draw.uniform() for _ in needles[1:])]
    haystack = episodes.weave(filler, [needle.statement for needle in needles], depths)
    text = f"{haystack.text}\n\n{episodes.question(needles[0])}"
    return tokenizer(text).input_ids, needles[0].value


def answer(model, tokenizer, ids: list[int]) -> str:
    generated = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    return tokenizer.decode(generated, skip_special_tokens=True)


def test_it_fits_into_the_package():
    assert sum(file.stat().st_size for file in Path(tiny.path()).iterdir()) <= 10_000_000


def test_each_digit_is_one_token(tokenizer):
    assert tokenizer.tokenize("is 90125.") == ["is", "Ġ9", "0", "1", "2", "5", "."]
    assert all(len(tokenizer.tokenize(lead + digit)) == 1 for lead in ("", " ") for digit in "0123456789")


def test_text_survives_the_round_trip(tokenizer):
    text = "Naïve café — 7 × 8 = 56,\n\tsaid  “Ünal” (日本) 🙂."
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_bos_is_added_only_when_asked_for(tokenizer):
    assert tokenizer.bos_token_id not in tokenizer("Hello").input_ids
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@pytest.mark.parametrize("length", [256, 512, 1024])
def test_full_cache_finds_needles_at_every_depth(model, tokenizer, length):
    cases = [prompt_and_value(tokenizer, length, depth, seed) for depth in DEPTHS for seed in range(4)]
    hits = [answer(model, tokenizer, ids).startswith(f" {value}.\n") for ids, value in cases]
    assert sum(hits) >= 0.95 * len(cases)


def test_without_the_needle_in_view_it_cannot_answer(model, tokenizer):
    """The last 256 tokens of a 1,024-token text whose needle lies in the first half hold no trace of the number."""
    cases = [prompt_and_value(tokenizer, 1024, depth, seed) for depth in (0.0, 0.25, 0.5) for seed in range(4)]
    hits = [value in answer(model, tokenizer, ids[-256:]) for ids, value in cases]
    assert sum(hits) == 0
