"""LongBench v2: prompts, truncation, extraction and buckets against a plain reading of the official scripts."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoTokenizer

from kv_lm_eval import harness, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import boundaries
from kv_lm_eval.tasks.longbench_tasks.v2 import report, scoring

pytestmark = pytest.mark.filterwarnings("ignore")
HEAD = "Please read the following text and answer the question{} below.\n\n"
ASKED = "What is the correct answer to this question: {question}\nChoices:\n(A) {a}\n(B) {b}\n(C) {c}\n(D) {d}\n\n"
FORM = 'Format your response as follows: "The correct answer is (insert answer here)".'
STEPS = "Let\u2019s think step by step:"


def rows() -> list[dict]:
    made = []
    for i in range(8):
        made.append({
            "_id": f"q{i}", "domain": "QA", "sub_domain": "Academic", "difficulty": ("easy", "hard")[i % 2],
            "length": ("short", "medium", "long")[i % 3], "question": f" Which is {i}? {{x}} ", "choice_A": f"a{i}\n",
            "choice_B": " b", "choice_C": "c", "choice_D": "d $C_A$", "answer": "ABCD"[i % 4],
            "context": f"\n Which is {i}? A text of {'many ' * (20 + 400 * (i % 2))} words {{0}} $Q$.\n\n",
        })  # fmt: skip
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("v2")
    (where / "data.json").write_text(json.dumps(rows()), encoding="utf-8")
    return where


def load(name: str, folder, **metadata):
    told = {"pretrained": "kv-tiny", "longbench2_dir": str(folder), **metadata}
    with harness.task_manager([name], None, told) as manager:
        return manager.load([name])["tasks"][name]


def by_hand(row: dict, head: str, end: str, context: bool = True) -> str:
    """The official prompt: markers replaced one after the other, in texts that were put in before too."""
    text = head + "<text>\n$DOC$\n</text>\n\n" * context
    text += ASKED.format(question="$Q$", a="$C_A$", b="$C_B$", c="$C_C$", d="$C_D$") + end
    for marker, field in (("$DOC$", "context"), ("$Q$", "question")):
        text = text.replace(marker, row[field].strip())
    for letter in "ABCD":
        text = text.replace(f"$C_{letter}$", row[f"choice_{letter}"].strip())
    return text


def test_prompts_are_the_official_ones(folder):
    task, steps = load("kv_longbench2", folder), load("kv_longbench2_cot", folder)
    assert [len(t.eval_docs) for t in (task, steps)] == [8, 8]
    for row, doc in zip(rows(), task.eval_docs, strict=True):
        assert task.fewshot_context(doc, 0) == by_hand(row, HEAD.format(""), FORM)
        assert steps.fewshot_context(doc, 0) == by_hand(row, HEAD.format("s"), STEPS)
    assert task.config.generation_kwargs == {"until": [], "do_sample": False, "max_gen_toks": 128}
    assert steps.config.generation_kwargs["max_gen_toks"] == 1024


@pytest.mark.parametrize("length", [200, 201])
def test_long_prompts_lose_their_middle_as_officially(length, folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    task, cut = load("kv_longbench2", folder, longbench_max_length=length), 0
    for row, doc in zip(rows(), task.eval_docs, strict=True):
        ids = tokenizer.encode(by_hand(row, HEAD.format(""), FORM))
        expected = by_hand(row, HEAD.format(""), FORM)
        if len(ids) > length:
            expected = tokenizer.decode(ids[: length // 2] + ids[-length // 2 :], skip_special_tokens=True)
            cut += 1
        assert task.fewshot_context(doc, 0) == expected
    assert cut == 4


def test_the_length_of_a_model_with_128k_positions_is_the_official_one(folder):
    assert load("kv_longbench2", folder, max_length=131072).settings.max_length == 120_000
    assert load("kv_longbench2", folder, max_length=4096).settings.max_length == 3500


def test_the_question_begins_after_the_text(folder):
    for name, metadata in (("kv_longbench2", {}), ("kv_longbench2", {"longbench_max_length": 200})):
        task = load(name, folder, **metadata)
        for doc in task.eval_docs:
            prompt = task.fewshot_context(doc, 0)
            request = task.construct_requests(doc, prompt, metadata=("t", 0, 1))
            tail = prompt[request.doc[boundaries.BEGINS] :]
            assert tail.startswith("What is the correct answer to this question: Which is") and tail.endswith(FORM)


CHOICES = {
    "The correct answer is (B)": "B",
    "**The correct answer is (C)**.": "C",
    "The correct answer is *D*": "D",
    "I think. The correct answer is A because (B)": "A",
    "The correct answer is (insert answer here). The correct answer is (B)": "B",
    "The correct answer is D, no: The correct answer is (A)": "A",
    "the correct answer is (B)": None,
    "The correct answer is (E)": None,
    "The correct answer is: (B)": None,
    "(B)": None,
    "": None,
}


def official(response: str) -> str | None:
    """The second reading of extract_answer."""
    plain = "".join(c for c in response if c != "*")
    for opened in ("(", ""):
        for at in (m.end() for m in re.finditer("The correct answer is ", plain)):
            rest = plain[at:]
            if rest.startswith(opened) and rest[len(opened) : len(opened) + 1] in tuple("ABCD"):
                if not opened or rest[2:3] == ")":
                    return rest[len(opened)]
    return None


@pytest.mark.parametrize("answer", CHOICES)
def test_the_choice_is_read_as_officially(answer):
    assert scoring.choice(answer) == CHOICES[answer] == official(answer)


def test_numbers_are_those_of_the_official_script(folder):
    task = load("kv_longbench2", folder)
    answers = [f"The correct answer is ({letter})" for letter in "ABCAABCD"]
    answers[2] = "  "  # not counted
    results = [task.process_results(doc, [answer]) for doc, answer in zip(task.eval_docs, answers, strict=True)]
    counted = [(row, answer) for row, answer in zip(rows(), answers, strict=True) if answer.strip()]

    def expected(kind: str, name: str) -> float:
        own = [official(answer) == row["answer"] for row, answer in counted if row[kind] == name]
        return round(100 * sum(own) / len(own), 1)

    aggregations = {m["metric"]: m["aggregation"] for m in task.config.metric_list}
    for kind, names in scoring.BUCKETS.items():
        for name in names:
            assert round(aggregations[name](r[name] for r in results if name in r), 1) == expected(kind, name)
    scores = [r["score"] for r in results if "score" in r]
    assert sum(scores) / len(scores) == pytest.approx(100 * sum(official(a) == r["answer"] for r, a in counted) / 7)
    assert [r["empty"] for r in results] == [0, 0, 1, 0, 0, 0, 0, 0]
    values = {"score,none": 57.142857, "easy,none": 50.0, "long,none": float("nan"), "empty,none": 0.125}
    configs = {"kv_longbench2": {"metadata": task.config.metadata}}
    page = report.page({"configs": configs, "results": {"kv_longbench2": values}})
    assert "Overall 57.1   Easy 50.0" in page and "Long" not in page.split("scores")[1] and "12.5%" in page


def test_the_second_question_holds_the_first_ones_reasoning(folder, tmp_path):
    first = load("kv_longbench2_cot", folder)
    samples = tmp_path / "samples.jsonl"
    lines = [{"doc_id": i, "doc": dict(doc), "resps": [[f" Because {i}. "]]} for i, doc in enumerate(first.eval_docs)]
    lines[3]["resps"] = [[" "]]  # not asked again, as officially
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task = load("kv_longbench2_cot_answer", folder, longbench2_cot=str(samples))
    assert [doc["_id"] for doc in task.eval_docs] == [f"q{i}" for i in range(8) if i != 3]
    doc, row = task.eval_docs[1], rows()[1]
    end = f"{STEPS} Because 1.\n\nBased on the above, what is the single, most likely answer choice? {FORM}"
    omitted = HEAD.format("s") + "The text is too long and omitted here.\n\n"
    assert task.fewshot_context(doc, 0) == by_hand(row, omitted, end, context=False)
    prompt = task.fewshot_context(doc, 0)
    request = task.construct_requests(doc, prompt, metadata=("t", 0, 1))
    assert prompt[request.doc[boundaries.BEGINS] :].startswith("Based on the above")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"answer": "E"}, r"row 0: answer"),
        ({"context": None}, r"row 0: context"),
        ({"_id": "q1"}, r"row 1: _id: 'q1' is that of"),
    ],
)
def test_rows_that_are_no_questions_are_told(change, said, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{**rows()[0], **change}, *rows()[1:]]), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        load("kv_longbench2", tmp_path)


@pytest.mark.parametrize(
    "name, metadata, said",
    [
        ("kv_longbench2", {"longbench2_dir": None}, "where is LongBench v2"),
        ("kv_longbench2", {"longbench2_dir": "/nowhere"}, "neither data.json nor data.jsonl"),
        ("kv_longbench2", {"longbench2_dir": "hub@main"}, "name a commit"),
        ("kv_longbench2", {"longbench2_dri": "x"}, "did you mean 'longbench2_dir'"),
        ("kv_longbench2_cot_answer", {}, "run kv_longbench2_cot with"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_line(name, metadata, said, folder):
    with pytest.raises(UserError, match=said) as error:
        load(name, folder, **metadata)
    assert "\n" not in str(error.value)


ARGS = {"pretrained": "kv-tiny", "method": "snapkv", "keep_ratio": 0.3, "question_in_prompt": False}


def test_a_run_says_the_share_that_is_compressed_and_its_samples_feed_the_second_question(folder, tmp_path):
    options = {"limit": 2, "gen_kwargs": {"max_gen_toks": 4}, "metadata": {"longbench2_dir": str(folder)}}
    tasks = ["kv_longbench2", "kv_longbench2_cot"]
    run = harness.run("kvcompressed", ARGS, tasks, log_samples=True, output_path=tmp_path, **options)
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    for name, head, end in (("kv_longbench2", HEAD.format(""), FORM), ("kv_longbench2_cot", HEAD.format("s"), STEPS)):
        shares = []
        for row in rows()[:2]:
            prompt = by_hand(row, head, end)
            offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
            begins = prompt.rindex("What is the correct answer to this question")
            shares.append(sum(last <= begins for _, last in offsets) / len(offsets))
        stats = run.results["config"]["kv_stats"]["by_task"][name]
        assert [stats["context_share"][k] for k in ("min", "max")] == pytest.approx(sorted(shares), abs=2e-4)
        assert f"  {name} " in run.said and "Not all questions were asked" in run.said
    (samples,) = tmp_path.rglob("samples_kv_longbench2_cot_*.jsonl")
    options["metadata"]["longbench2_cot"] = str(samples)
    second = harness.run("kvcompressed", {**ARGS, "question_in_prompt": True}, ["kv_longbench2_cot_answer"], **options)
    assert second.results["n-samples"]["kv_longbench2_cot_answer"]["effective"] >= 1


def test_a_text_that_is_next_to_nothing_stops_the_run(tmp_path):
    row = {**rows()[0], "context": "x", "question": "Why? " * 800}
    (tmp_path / "data.json").write_text(json.dumps([row]), encoding="utf-8")
    with pytest.raises(UserError, match="at least 10% must stand before it"):
        harness.run("kvcompressed", ARGS, ["kv_longbench2"], metadata={"longbench2_dir": str(tmp_path)})
