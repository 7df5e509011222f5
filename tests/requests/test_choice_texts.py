"""Choices without tokens, contexts of blanks, continuations beyond the model's maximum."""

from __future__ import annotations

import pytest
from lm_eval.api.instance import Instance
from model.test_requests import STORY, load
from tokenizers.processors import TemplateProcessing

from kv_lm_eval.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = [
    {"method": "full"},
    {"method": "no_cache"},
    {"method": "window_recompute", "window_size": 16},
    {"method": "snapkv", "max_capacity_prompt": 24, "window_size": 8},
    {"method": "snapkv", "max_capacity_prompt": 24, "window_size": 8, "question_in_prompt": False},
]
IDS = [f"{s['method']}{'' if s.get('question_in_prompt', True) else ' question first'}" for s in METHODS]


def choice(context: str, continuation: str, idx: int = 0, doc: int = 0) -> Instance:
    return Instance("loglikelihood", {"question": "is"}, (context, continuation), idx, ("t", doc, 1))


def scores(lm, *asks: Instance) -> list[float]:
    return [s for s, _ in lm.loglikelihood(list(asks), disable_tqdm=True)]


@pytest.mark.parametrize("settings", METHODS, ids=IDS)
@pytest.mark.parametrize("context", [STORY + "The number is", "", " "])
def test_a_continuation_of_no_tokens_is_refused_with_its_document_and_choice(context, settings):
    lm = load("kvcompressed", **settings)
    good = choice(STORY + "The number is", " 48213", 0, 3)
    empty = "" if context != " " else None
    asks = [good, choice(context, "", 2, 5)] if empty is not None else [good]
    for together in ([asks[-1]], asks) if empty is not None else ():
        with pytest.raises(UserError, match=r"choice 2 of document 5 of t has a continuation of no tokens.*would win"):
            scores(lm, *together)


def test_a_continuation_that_melts_into_its_context_is_refused():
    """ "harb" and "our" are two tokens apart and may be as many together: then the continuation has none of its own."""
    lm = load("kvcompressed", method="full")
    words = sorted(lm.tokenizer.get_vocab(), key=len)
    for whole in words:
        text = lm.tokenizer.convert_tokens_to_string([whole])
        if text.isalpha() and len(lm.tok_encode(text)) == len(lm.tok_encode(text[:-1])) == 1:
            break
    with pytest.raises(UserError, match="choice 1 of document 0 of t has a continuation of no tokens"):
        scores(lm, choice(text[:-1], text[-1], 1))


@pytest.mark.parametrize("settings", METHODS, ids=IDS)
def test_a_context_of_blanks_is_lm_evals_empty_context(settings):
    lm = load("kvcompressed", **settings)
    blanks = ("  ", "\n", " \t\n")
    beside = choice(STORY + "The number is", " 48213")
    got = scores(lm, beside, *(choice(b, "The boats lay still") for b in blanks))
    expected = scores(lm, beside, *(choice("", b + "The boats lay still") for b in blanks))
    assert got == pytest.approx(expected, abs=2e-4)


def test_a_context_of_blanks_behind_a_bos_is_that_of_lm_evals_model():
    answers = {}
    for name, args in (("kvcompressed", {"method": "full"}), ("hf", {})):
        lm = load(name, **args)
        bos = lm.tokenizer.bos_token = lm.tokenizer.convert_ids_to_tokens(0)
        lm.tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
        answers[name] = scores(lm, choice("  ", "The boats"), choice("", "The boats"))
    assert answers["kvcompressed"] == pytest.approx(answers["hf"], abs=1e-4)


@pytest.mark.parametrize("settings", [METHODS[0], METHODS[3]], ids=lambda s: s["method"])
@pytest.mark.parametrize("over", [0, 1, 30])
def test_a_continuation_beyond_the_models_maximum_is_refused_with_that_reason(settings, over):
    lm = load("kvcompressed", max_length=48, overlong="truncate_left", **settings)
    words = lm.tokenizer.decode(lm.tok_encode(STORY * 3)[: 49 + over])
    n = len(lm.tok_encode(words))
    with pytest.raises(UserError, match=rf"choice 4 of document 2 of t has no room.*{n} tokens.*maximum is 48"):
        scores(lm, choice("The boats.", words, 4, 2))
