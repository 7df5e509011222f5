"""Generated RULER prompts: at equal seeds those of lm-eval's own tasks, where these follow the official scripts."""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import re
import sys
import types
from itertools import islice

import nltk
import numpy as np
import pytest
from needle_tokenizers import load

from kv_lm_eval.tasks.needle.haystack import Counter
from kv_lm_eval.tasks.needle.ruler import data, generate, split, wordlists

SEED = 42  # of lm-eval's modules, and of ours where none is given
PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
NAMED = zip(wordlists.NOUNS, wordlists.ADJECTIVES * 3, strict=False)
TEXT = " ".join(f"The {noun} was {adjective} on day {i}. Nobody asked." for i, (noun, adjective) in enumerate(NAMED))
NIAH = {
    "niah_single_1": ({"haystack": "repeat"}, {"type_haystack": "repeat"}, 500),
    "niah_single_2": ({"haystack": "essay"}, {"type_haystack": "essay"}, 2600),
    "niah_single_3": (
        {"haystack": "essay", "value": "uuids"},
        {"type_haystack": "essay", "type_needle_v": "uuids"},
        2600,
    ),
    "niah_multikey_1": ({"haystack": "essay", "keys": 4}, {"type_haystack": "essay", "num_needle_k": 4}, 2600),
    "niah_multikey_2": ({"haystack": "needle"}, {"type_haystack": "needle"}, 700),
    "niah_multikey_3": (
        {"haystack": "needle", "key": "uuids", "value": "uuids"},
        {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
        1500,
    ),
    "niah_multivalue": ({"haystack": "essay", "values": 4}, {"type_haystack": "essay", "num_needle_v": 4}, 2600),
    "niah_multiquery": ({"haystack": "essay", "queries": 4}, {"type_haystack": "essay", "num_needle_q": 4}, 2600),
}


@pytest.fixture(scope="module")
def counter() -> Counter:
    return Counter(load("kv-tiny"))


@pytest.fixture(scope="module")
def theirs():
    """lm-eval's modules, over our words instead of the package that they want, and our borders of sentences."""
    lists = dict(zip(("noun", "adjective", "verb"), data._lists("builtin"), strict=True))
    categories = {**lists, **{f"{name}s": words for name, words in lists.items()}}
    words = types.ModuleType("wonderwords")
    words.RandomWord = type("RandomWord", (), {"_categories": categories})
    names = ("prepare_niah", "cwe_utils", "vt_utils", "fwe_utils", "qa_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wonderwords", words)
        patch.setattr(nltk.data, "find", lambda *_, **__: None)
        for name in ("prepare_niah", "niah_utils", "cwe_utils"):
            sys.modules.pop(f"lm_eval.tasks.ruler.{name}", None)
        found = types.SimpleNamespace(**{n: importlib.import_module(f"lm_eval.tasks.ruler.{n}") for n in names})
        patch.setattr(found.prepare_niah, "sent_tokenize", data.sentences)
        yield found
        for name in ("prepare_niah", "niah_utils", "cwe_utils"):
            sys.modules.pop(f"lm_eval.tasks.ruler.{name}", None)


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    random.seed(SEED)
    np.random.seed(SEED)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@pytest.mark.parametrize("task", NIAH)
def test_needles_are_lm_evals_with_the_beginning_of_the_answer_counted_as_officially(task, theirs, counter):
    ours, other, length = NIAH[task]
    template = (
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will "
        "quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for "
        "{query} mentioned in the provided text?" + PREFIX
    )
    essay = TEXT.split(" ")
    haystack = essay if ours["haystack"] == "essay" else theirs.prepare_niah.get_haystack(ours["haystack"])
    settings = {"type_needle_k": "words", "type_needle_v": "numbers", **other}
    expected = theirs.prepare_niah.generate_samples(
        haystack, counter.tokenizer, max_seq_length=length, template=template, num_samples=3, **settings
    )
    maker = generate.Niah(
        random.Random(SEED), SEED, length, data._pairs("builtin"), essay=essay, sentences=data.sentences, **ours
    )
    got = list(islice(generate.samples(maker, length, 128, counter.count), 3))
    assert [sample.text for sample in got] == [doc["input"] for doc in expected]
    assert [sample.outputs for sample in got] == [doc["outputs"] for doc in expected]


def test_variable_tracking_is_lm_evals(theirs, counter):
    write = theirs.vt_utils.sys_vartrack_w_noise_random
    example = write(tokenizer=counter.tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    expected = write(tokenizer=counter.tokenizer, num_samples=3, max_seq_length=1200, icl_example=example)
    maker = generate.Variables(random.Random(SEED), np.random.RandomState(SEED), counter.count, 30)
    got = list(islice(generate.samples(maker, 1200, 30, counter.count), 3))
    assert [sample.text.rstrip() for sample in got] == [f"{doc['input']} {doc['gen_prefix']}" for doc in expected]
    assert [sample.outputs for sample in got] == [doc["outputs"] for doc in expected]


def test_frequent_words_are_lm_evals(theirs, counter):
    expected = theirs.fwe_utils.sys_kwext(counter.tokenizer, max_seq_length=700, num_samples=3)
    got = list(islice(generate.frequent_words(random.Random(SEED), SEED, 700, counter.count), 3))
    assert [sample.text for sample in got] == [f"{doc['input']} {doc['gen_prefix']}" for doc in expected]
    assert [sample.outputs for sample in got] == [doc["outputs"] for doc in expected]


def test_common_words_follow_the_official_script_where_lm_eval_does_not(theirs, counter, monkeypatch):
    """lm-eval's prompt lacks the worked example, which it counts, and its shuffles go on from prompt to prompt."""

    class Anew:
        @staticmethod
        def shuffle(words):
            random.Random(SEED).shuffle(words)

    monkeypatch.setattr(theirs.cwe_utils, "RNG", Anew)
    for length in (1200, 4096):
        random.seed(SEED)
        maker = generate.CommonWords(random.Random(SEED), SEED, length, data._words("builtin", 1, SEED))
        for size in (20, 60, 90):
            example, text, answer = theirs.cwe_utils.generate_input_output(size, length)
            assert maker.write(size) == generate.Sample(f"{example}\n{text}", answer)
    first = next(generate.samples(maker, 4096, 120, counter.count))
    assert 3500 < counter.count(first.text) <= 4096 - 120


def paragraphs(n: int) -> list[str]:
    return [
        f"The {wordlists.NOUNS[i]} of year {i} was {wordlists.ADJECTIVES[i % 90]} and much liked." for i in range(n)
    ]


def squad() -> dict:
    texts = paragraphs(60)
    articles = []
    for at in range(0, 60, 6):
        articles.append({"paragraphs": [
            {"context": text, "qas": [
                {"question": f"How was the thing of year {at + i}?", "answers": [{"text": text.split()[-5]}],
                 "is_impossible": i % 3 == 2}
            ]} for i, text in enumerate(texts[at : at + 6])
        ]})  # fmt: skip
    return {"data": articles}


def hotpotqa() -> list[dict]:
    texts = paragraphs(60)
    return [
        {
            "question": f"What of {i}?",
            "answer": f"year {i}",
            "context": [[f"T{j}", [texts[j], "So."]] for j in (i, i + 1)],
        }
        for i in range(0, 58, 2)
    ]


@pytest.mark.parametrize(
    "read, ours, content", [("read_squad", "squad", squad), ("read_hotpotqa", "hotpotqa", hotpotqa)]
)
@pytest.mark.parametrize("length", [260, 700, 6000])
def test_questions_about_documents_are_lm_evals(read, ours, content, length, theirs, counter, monkeypatch):
    module = theirs.qa_utils
    monkeypatch.setattr(module, "download_json", lambda url: content())
    monkeypatch.setattr(module, "TEMPLATE", module.CONFIG["template"] + " Answer:")
    questions, documents = getattr(module, read).__wrapped__()
    random.seed(SEED)
    expected = module.generate_samples(counter.tokenizer, documents, questions, length, num_samples=3)
    maker = generate.Documents(random.Random(SEED), SEED, data.QUESTIONS[ours](content()))
    got = list(islice(generate.samples(maker, length, 32, counter.count), 3))
    if length == 6000:  # all documents are taken, and lm-eval shuffles the list that the next question takes them from
        for sample, doc in zip(got, expected, strict=True):
            assert in_any_order(sample.text) == in_any_order(doc["input"])
    else:
        assert [sample.text for sample in got] == [doc["input"] for doc in expected]
    assert [sample.outputs for sample in got] == [doc["outputs"] for doc in expected]


def in_any_order(prompt: str) -> list[str]:
    return sorted(re.sub(r"Document \d+:", "", prompt).split("\n\n"))


def test_a_key_that_is_asked_for_is_in_no_other_fact():
    maker = generate.Niah(random.Random(1), SEED, 600, ["red-fox", "old-oak"], haystack="needle")
    for sample in (maker.write(20) for _ in range(20)):
        row = split.row("niah_multikey_2", sample.text, sample.outputs)
        key = row["question"].split(" for ")[1].split(" mentioned")[0]
        assert row["context"].count(f" for {key} is: ") == 1


@pytest.mark.parametrize("kind", ["niah", "vt", "cwe", "fwe"])
def test_a_length_that_holds_no_prompt_is_told_at_once(kind, counter):
    rng = random.Random(SEED)
    makers = {
        "niah": lambda: generate.Niah(rng, SEED, 90, data._pairs("builtin"), haystack="repeat"),
        "vt": lambda: generate.Variables(rng, np.random.RandomState(SEED), counter.count, 30),
        "cwe": lambda: generate.CommonWords(rng, SEED, 90, data._words("builtin", 1, SEED)),
    }
    with pytest.raises(generate.DoesNotFit, match="give l"):
        if kind == "fwe":
            next(generate.frequent_words(rng, SEED, 90, counter.count))
        else:
            next(generate.samples(makers[kind](), 120, 30, counter.count))


@pytest.mark.parametrize("length", [512, 8192, 131072])
def test_there_are_words_for_any_length(length):
    words = data._words("builtin", length, SEED)
    assert len(set(words)) == len(words) >= length // 4 or length == 512
    assert words == data._words("builtin", length, SEED)


def test_word_lists_hold_each_word_once():
    for words in (wordlists.NOUNS, wordlists.ADJECTIVES, wordlists.VERBS):
        assert len(set(words)) == len(words) > 100 and all(word.isalpha() and word.islower() for word in words)
