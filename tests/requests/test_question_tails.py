"""What is fed after the compression of lm-eval's own RULER prompts of 4,096 tokens, counted by a real tokenizer."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import random
import sys
import types
from pathlib import Path

import nltk
import numpy as np
import pytest
import transformers

from kv_lm_eval.requests import boundaries
from kv_lm_eval.tasks.needle.ruler import wordlists

FOLDER = Path(os.environ.get("KV_LM_EVAL_REAL", "/work/real")) / "smollm2-hf"
KEYS = {"adjectives": ["weak"], "nouns": ["satchel"], "verbs": ["go"]}
WORDS = {"adjective": wordlists.ADJECTIVES, "noun": wordlists.NOUNS, "verb": wordlists.VERBS}


@pytest.fixture(scope="module")
def tokenizer():
    if not (FOLDER / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer is not here: {FOLDER} (set KV_LM_EVAL_REAL to the folder that has it)")
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def ruler():
    """lm-eval's modules over a few words, so that no package of words and no network is needed."""
    words = types.ModuleType("wonderwords")
    words.RandomWord = type("RandomWord", (), {"_categories": {**KEYS, **WORDS}})
    stubbed = ("prepare_niah", "niah_utils", "cwe_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wonderwords", words)
        patch.setattr(nltk.data, "find", lambda *_, **__: None)
        for name in stubbed:
            sys.modules.pop(f"lm_eval.tasks.ruler.{name}", None)
        names = (*stubbed, "vt_utils", "fwe_utils")
        yield types.SimpleNamespace(**{name: importlib.import_module(f"lm_eval.tasks.ruler.{name}") for name in names})
        for name in stubbed:
            sys.modules.pop(f"lm_eval.tasks.ruler.{name}", None)


def needles(ruler, tokenizer, haystack: str) -> dict:
    return ruler.prepare_niah.generate_samples(
        ruler.prepare_niah.get_haystack(haystack),
        tokenizer,
        max_seq_length=4096,
        type_haystack=haystack,
        type_needle_k="words",
        type_needle_v="numbers",
        template=ruler.niah_utils.TEMPLATE,
        num_samples=1,
    )[0]


def variables(ruler, tokenizer, with_example: bool) -> dict:
    write, example = ruler.vt_utils.sys_vartrack_w_noise_random, None
    if with_example:
        example = write(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    return write(tokenizer=tokenizer, num_samples=1, max_seq_length=4096, icl_example=example)[0]


# The tail, and the least tokens of the prompt. Without its example lm-eval's vt has the beginning of the answer twice.
TAILS = {
    "niah, repeats": (lambda r, t: needles(r, t, "repeat"), 32, 3700),
    "niah, needles": (lambda r, t: needles(r, t, "needle"), 32, 3500),
    "vt, alone": (lambda r, t: variables(r, t, False), 94, 3700),
    "vt": (lambda r, t: variables(r, t, True), 57, 3600),
    "cwe": (lambda r, t: ruler_cwe(r, t), 33, 2000),
    "fwe": (lambda r, t: r.fwe_utils.sys_kwext(t, max_seq_length=4096, num_samples=1)[0], 46, 3600),
}


def ruler_cwe(ruler, tokenizer) -> dict:
    return ruler.cwe_utils.sys_word_pair_random(1, 4096, tokenizer)[0]


@pytest.mark.parametrize("what", TAILS)
def test_only_the_question_and_the_beginning_of_the_answer_are_fed_after_the_compression(what, ruler, tokenizer):
    make, tail, least = TAILS[what]
    random.seed(42)
    np.random.seed(42)
    with contextlib.redirect_stdout(io.StringIO()):
        doc = make(ruler, tokenizer)
    prompt = f"{doc['input']} {doc['gen_prefix']}"

    def tokens_from(text: str, start: int) -> int:
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        return boundaries.tokens_by_offsets(offsets, start)

    found = boundaries.find(prompt, doc, None, what, tokens_from)
    assert found == boundaries.Boundary(tail, False)
    assert tokens_from(prompt, 0) > least
