"""LooGLE: prompts, cut and automatic scores against a second reading of the official scripts, and whole runs."""

from __future__ import annotations

import json
import re
import warnings

import numpy
import pytest
from golden import OWN, read_jsonl
from nltk.translate.bleu_score import sentence_bleu
from transformers import AutoTokenizer

from kv_lm_eval import harness, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import boundaries
from kv_lm_eval.tasks.longbench_tasks.loogle.metrics import match, similarity

pytestmark = pytest.mark.filterwarnings("ignore")
NEW_TOKENS = {"shortdep_qa": 300, "shortdep_cloze": 50, "longdep_qa": 500, "longdep_summarization": 500}
MODULES = {"similarity": similarity, "match": match}
TEXTS = ["It's {Meg} who wants to stop the party.\n" * 30, "Another text. " * 110]


def pairs(task: str, text: int) -> list[dict]:
    answer = {"<mask-0>": "Meg", "<mask-1>": f"Jo {text}"} if task == "shortdep_cloze" else f'It\'s "{text}".'
    return [{"Q": f"Who's <mask-0> {{of}} {n}?", "A": answer, "S": ["x"], "type": "t"} for n in range(2 + text)]


def lines(task: str, as_text: bool = True) -> list[dict]:
    """The official layout: questions as a list's text in the released files, as a list elsewhere."""
    if task == "longdep_summarization":
        return [{"input": t, "title": "", "qa_pairs": "none", "output": f"Sum {n}."} for n, t in enumerate(TEXTS)]
    asked = [pairs(task, n) for n in range(len(TEXTS))]
    return [
        {"input": t, "title": str(n), "qa_pairs": repr(asked[n]) if as_text else asked[n], "output": "none"}
        for n, t in enumerate(TEXTS)
    ]


def write(where, rows_of) -> None:
    where.mkdir(exist_ok=True, parents=True)
    for task in NEW_TOKENS:
        (where / f"{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_of(task)), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("loogle")
    write(where / "data", lines)  # as data.zip unpacks
    return where


def load(folder, *names: str, **metadata):
    told = {"pretrained": "kv-tiny", "loogle_dir": str(folder), **metadata}
    with harness.task_manager(names, None, told) as manager:
        return manager.load(list(names))["tasks"]


def by_hand(task: str, text: str, question: str) -> tuple[str, str]:
    """config/task2prompt.json, filled, as head with the text and what comes after it."""
    if task == "longdep_summarization":
        return "Please generate a summary of the below paper. \n" + text, "\n Summarization: "
    if task == "shortdep_cloze":
        told = (
            "Please fill in the clozes based on the given long texts below. Each of the placeholder '<mask-n>' in the "
            "question could be an entity of Person, Location or Organiocation. The same masks represent the same "
            "entity. Output a json format answer, for example: {'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion "
            "Magazine','<mask-2>': 'Bethel Horizon'}\n"
        )
        return told + text, "\n Question: " + question + " What are the masked entities? \nAnswer:"
    told = "Please answer the question based on the long texts below. \n"
    return told + text, "\nQuestion: " + question + "\nAnswer: "


def asked(task: str) -> list[tuple[str, str]]:
    if task == "longdep_summarization":
        return [(text, "") for text in TEXTS]
    return [(text, pair["Q"]) for n, text in enumerate(TEXTS) for pair in pairs(task, n)]


def test_prompts_are_the_official_ones_and_the_question_is_what_follows_the_text(folder):
    tasks = load(folder, "kv_loogle")
    assert {name.removeprefix("kv_loogle_") for name in tasks} == set(NEW_TOKENS)
    for name, most in NEW_TOKENS.items():
        task = tasks[f"kv_loogle_{name}"]
        assert task.config.generation_kwargs == {"until": [], "do_sample": False, "max_gen_toks": most}
        assert len(task.eval_docs) == len(asked(name))
        for doc, (text, question) in zip(task.eval_docs, asked(name), strict=True):
            head, tail = by_hand(name, text, question)
            prompt = task.fewshot_context(doc, 0)
            assert prompt == head + tail
            request = task.construct_requests(doc, prompt, metadata=("t", 0, 1))
            assert prompt[request.doc[boundaries.BEGINS] :].strip() == tail.strip()


@pytest.mark.parametrize("length", [200, 201])
def test_long_prompts_lose_their_middle_as_officially(length, folder):
    """get_pred of pred_opensource_models.py: the two halves are decoded apart."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    (task,) = load(folder, "kv_loogle_shortdep_qa", longbench_max_length=length).values()
    ids = tokenizer("".join(by_hand("shortdep_qa", *asked("shortdep_qa")[0]))).input_ids
    halves = ids[:100], ids[len(ids) - 100 :]
    expected = "".join(tokenizer.decode(half, skip_special_tokens=True) for half in halves)
    assert len(ids) > 201 and task.fewshot_context(task.eval_docs[0], 0) == expected


def test_the_hubs_rows_and_lists_of_questions_are_the_same_documents(folder, tmp_path):
    def of_hub(task: str) -> list[dict]:
        rows = []
        for one in lines(task, as_text=False):
            if task == "longdep_summarization":
                rows.append({"context": one["input"], "question": "", "answer": one["output"]})
                continue
            for pair in one["qa_pairs"]:
                answer = list(pair["A"].values()) if isinstance(pair["A"], dict) else pair["A"]
                rows.append({"context": one["input"], "question": pair["Q"], "answer": answer, "id": "x"})
        return rows

    write(tmp_path / "rows", of_hub)
    write(tmp_path / "lists", lambda task: lines(task, as_text=False))
    for name, task in load(folder, "kv_loogle").items():
        for other in ("rows", "lists"):
            assert list(load(tmp_path / other, name)[name].eval_docs) == list(task.eval_docs)


def test_texts_are_not_copied_for_their_questions(folder):
    (task,) = load(folder, "kv_loogle_longdep_qa").values()
    assert len({id(doc["context"]) for doc in task.eval_docs}) == len(TEXTS)


def test_scores_are_the_official_ones():
    """The golden file was made by nltk, rouge 1.0.1 and the official functions; null is where these raise."""
    seen = dict.fromkeys(MODULES, 0)
    for line in read_jsonl(OWN / "loogle.jsonl"):
        module = MODULES[line["metric"]]
        for text, expected in line["scored"]:
            got = module.score(text, line["reference"])
            if line["metric"] == "match":
                count = len(json.loads(line["reference"]))
                assert got == {n: tuple(e or (0, count)) for n, e in zip(module.NAMES, expected, strict=True)}, text
            else:
                assert got == {n: e or 0.0 for n, e in zip(module.NAMES, expected, strict=True)}, text
            seen[line["metric"]] += 1
    assert seen["similarity"] > 500 and seen["match"] > 40


def test_bleu_is_nltks():
    words = "a b c d e a b c a b".split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(len(words) + 1):
            for j in range(1, len(words) + 1):
                made, wanted = words[i:], words[:j][::-1] + words[:j]
                for n in (1, 4):
                    weights = tuple(float(k == n) for k in range(1, 5))
                    assert similarity.bleu(made, wanted, n) == sentence_bleu([wanted], made, weights=weights)


def test_numbers_of_a_run_are_those_of_the_official_scripts():
    values = [0.1, 0.2, 0.4, 2.2250738585072014e-308]
    assert similarity.percent(values) == pytest.approx(100 * numpy.mean(values), rel=1e-12)
    assert match.percent([(1, 3), (0, 2), (1, 1)]) == 100 * round(2 / 6, 4) == 33.33


@pytest.mark.parametrize(
    "task, change, said",
    [
        ("shortdep_qa", {"qa_pairs": "[{'Q': "}, "line 1: qa_pairs: .* is no list of questions"),
        ("shortdep_qa", {"qa_pairs": [{"Q": "Who?"}]}, "line 1: qa_pairs: 0.A"),
        ("shortdep_qa", {"qa_pairs": [{"Q": "Who?", "A": ""}]}, "line 1: a text and an answer must not be empty"),
        ("shortdep_qa", {"input": 3}, "line 1: input"),
        ("longdep_summarization", {"output": None}, "line 1: output"),
    ],
)
def test_rows_of_something_else_are_told(task, change, said, tmp_path):
    (tmp_path / f"{task}.jsonl").write_text(json.dumps({**lines(task)[0], **change}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=said):
        load(tmp_path, f"kv_loogle_{task}")


@pytest.mark.parametrize(
    "metadata, said",
    [
        ({"loogle_dir": None}, "where is LooGLE"),
        ({"loogle_dir": "/nowhere"}, "loogle_dir=/nowhere: shortdep_qa.jsonl is not in"),
        ({"loogle_dir": "hub@main"}, "name a commit"),
        ({"loogle_dri": "x"}, "did you mean 'loogle_dir'"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_line(metadata, said, folder):
    with pytest.raises(UserError, match=said) as error:
        load(folder, "kv_loogle_shortdep_qa", **metadata)
    assert "\n" not in str(error.value)


ARGS = {"pretrained": "kv-tiny", "method": "snapkv", "keep_ratio": 0.3, "question_in_prompt": False}


def test_a_run_says_the_share_that_is_compressed_and_reads_a_text_once(folder, monkeypatch):
    from kv_lm_eval.engine import question

    prefilled, original = [], question.prefill_for_all
    monkeypatch.setattr(
        question, "prefill_for_all", lambda model, new, rows: prefilled.extend(rows) or original(model, new, rows)
    )
    options = {"metadata": {"loogle_dir": str(folder)}, "gen_kwargs": {"max_gen_toks": 2}}
    run = harness.run("kvcompressed", ARGS, ["kv_loogle"], **options)
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    for name in NEW_TOKENS:
        shares = []
        for text, question_of_it in asked(name):
            head, tail = by_hand(name, text, question_of_it)
            whole = tokenizer(head + tail, return_offsets_mapping=True)
            begins = len(head + tail) - len(tail.lstrip())
            before = sum(end <= begins for _, end in whole["offset_mapping"])
            shares.append(before / len(whole["input_ids"]))
        stats = run.results["config"]["kv_stats"]["by_task"][f"kv_loogle_{name}"]
        assert [stats["context_share"][k] for k in ("min", "max")] == pytest.approx(
            [min(shares), max(shares)], abs=2e-4
        )
    # shortdep_qa and longdep_qa have the same texts and words before them; other rows are the self-check's
    prefilled = [row for row in prefilled if "Please" in tokenizer.decode(row)]
    assert len(prefilled) == len(set(map(tuple, prefilled))) == 3 * len(TEXTS)


@pytest.mark.parametrize("name", ["shortdep_qa", "shortdep_cloze", "longdep_qa"])
def test_a_text_that_is_next_to_nothing_stops_the_run(name, tmp_path):
    one = {"input": "x", "qa_pairs": [{**pairs(name, 0)[0], "Q": "Who? " * 800}]}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(one) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape("at least 10% must stand before it")):
        harness.run("kvcompressed", ARGS, [f"kv_loogle_{name}"], metadata={"loogle_dir": str(tmp_path)})
