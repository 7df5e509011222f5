"""InfiniteBench: prompts, cut and scores against a second reading of the official scripts, and whole runs."""

from __future__ import annotations

import json
import re

import pytest
from golden import OWN, read_jsonl
from transformers import AutoTokenizer

from kv_lm_eval import harness, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.requests import boundaries

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = ["run", "Emma {x}", "c.d", "A long walk"]
TEXT = "One {text} of many words. "
ASKED = {  # what the released rows ask
    "passkey": ("What is the pass key?", ["71432"]),
    "number_string": ("What is the sequence of digits?", ["5551117770"]),
    "kv_retrieval": ('Key: "ab-1"\nThe value associated with the specified key is: ', ["c0-ffee"]),
    "longbook_qa_eng": ("Who is {Emma}?", ["A lady", "the heroine"]),
    "longbook_choice_eng": ("Who walks?", ["c.d"]),
    "longdialogue_qa_eng": ("", ["JANE"]),
    "code_debug": ("", ["A long walk"]),
    "math_find": ("You should answer with only one number. The second largest number of the list is: ", ["64"]),
}
NEW_TOKENS = dict(zip(ASKED, (6, 12, 50, 40, 40, 40, 5, 3), strict=True))


def row(task: str, words: int = 40) -> dict:
    asked, answer = ASKED[task]
    options = OPTIONS if task in ("longbook_choice_eng", "code_debug") else []
    return {"id": 0, "context": TEXT * words, "input": asked, "answer": answer, "options": options}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("infinitebench")
    for task in ASKED:
        lines = (json.dumps(row(task, words)) + "\n" for words in (40, 120))
        (where / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return where


def load(folder, *names: str, **metadata):
    told = {"pretrained": "kv-tiny", "infinitebench_dir": str(folder), **metadata}
    with harness.task_manager(names, None, told) as manager:
        return manager.load(list(names))["tasks"]


def by_hand(task: str, one: dict) -> tuple[str, str]:
    """create_prompt with the templates for YaRN-Mistral, as head with context and what comes after it."""
    options = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", one["options"], strict=False))
    hidden = "There is an important info hidden inside a lot of irrelevant text. Find it"
    quiz = "I will quiz you about the important information"
    first = {
        "passkey": f"{hidden} and memorize it. {quiz}.",
        "number_string": f"{hidden}. {quiz} there.",
        "kv_retrieval": "Extract the value corresponding to the specified key in the JSON object below.",
        "longbook_qa_eng": "Read the book and answer the question. Be very concise in your answer.",
        "longbook_choice_eng": "Read the book and answer the question.",
        "longdialogue_qa_eng": "Below is a dialogue script where one random occurrence of a character name is replaced "
        'with "$$MASK$$", and you should try to guess who that character is.',
        "code_debug": "Following is a Python code where exactly one of the functions/methods has a deliberate error "
        "that makes it crash.",
        "math_find": "What is the second largest number in the following list?",
    }[task]
    last = {
        "passkey": one["input"] + "\n\nThe pass key is",
        "number_string": one["input"] + "\n\nThe sequence of digits is",
        "kv_retrieval": one["input"],
        "longbook_qa_eng": f"Question: {one['input']}\nAnswer:",
        "longbook_choice_eng": f"Question: {one['input']}\n{options}\nThe letter of the correct answer is",
        "longdialogue_qa_eng": "The name that has been replaced with $$MASK$$ is likely",
        "code_debug": f"Options:\n{options}\nThe correct option is:",
        "math_find": one["input"],
    }[task]
    return f"{first}\n\n{one['context']}", f"\n\n{last}"


def test_prompts_are_the_official_ones_and_the_question_is_what_follows_the_text(folder):
    tasks = load(folder, "kv_infinitebench")
    assert {name.removeprefix("kv_infinitebench_") for name in tasks} == set(ASKED)
    for name in ASKED:
        task = tasks[f"kv_infinitebench_{name}"]
        assert task.config.generation_kwargs == {"until": [], "do_sample": False, "max_gen_toks": NEW_TOKENS[name]}
        for doc, words in zip(task.eval_docs, (40, 120), strict=True):
            head, tail = by_hand(name, row(name, words))
            prompt = task.fewshot_context(doc, 0)
            assert prompt == head + tail
            request = task.construct_requests(doc, prompt, metadata=("t", 0, 1))
            assert prompt[request.doc[boundaries.BEGINS] :].strip() == tail.strip()


@pytest.mark.parametrize("length", [200, 201])
def test_long_prompts_lose_their_middle_as_officially(length, folder):
    """truncate_input of eval_yarn_mistral.py: two halves of length // 2, decoded as one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    (task,) = load(folder, "kv_infinitebench_passkey", longbench_max_length=length).values()
    ids = tokenizer.encode("".join(by_hand("passkey", row("passkey", 120))))
    kept = ids[: length // 2] + ids[len(ids) - length // 2 :]
    assert len(kept) == 200 < len(ids)
    assert task.fewshot_context(task.eval_docs[1], 0) == tokenizer.decode(kept, skip_special_tokens=True)


def test_where_nobody_asks_the_model_decides_and_128k_is_the_most(folder):
    def kept(**metadata) -> int:
        (task,) = load(folder, "kv_infinitebench_passkey", **metadata).values()
        return task.settings.max_length

    assert kept(max_length=4096) == 4096 and kept(max_length=131072) == 131072 == kept(max_length=1_000_000)
    (task,) = load(folder, "kv_infinitebench_longbook_qa_eng", max_length=640).values()
    tokens = len(task.settings.tokenizer(task.fewshot_context(task.eval_docs[1], 0)).input_ids)
    assert 500 < tokens <= 640 - 40  # with room for the answer


def test_scores_are_the_official_ones(folder):
    """The golden file was made by the official functions; None is where they end with an error."""
    tasks = load(folder, "kv_infinitebench")
    seen = 0
    for line in read_jsonl(OWN / "infinitebench.jsonl"):
        task, answer, options = tasks[f"kv_infinitebench_{line['task']}"], line["answer"], line["options"]
        answers = answer if isinstance(answer, list) else [str(answer)]
        doc = {"answers": answers[:1] if options else answers, "all_classes": options, "row": 0}
        for text, expected in line["scored"]:
            assert task.scored(text, doc) == {"score": expected or 0.0}, (line["task"], text)
            seen += 1
    assert seen > 1500


def test_a_right_answer_is_right_and_a_wrong_one_wrong(folder):
    right = {"longbook_qa_eng": "the lady", "longbook_choice_eng": " C", "code_debug": " D.", "math_find": " 64\n"}
    for name, task in load(folder, "kv_infinitebench").items():
        doc = task.eval_docs[0]
        name = name.removeprefix("kv_infinitebench_")
        score = task.scored(right.get(name, f" {ASKED[name][1][0]}."), doc)["score"]
        assert score == 1
        assert task.scored("B", doc)["score"] == 0
    assert [m["aggregation"]([1.0, 0.0, 0.0]) for m in task.config.metric_list if m["metric"] == "score"] == [33.33]


@pytest.mark.parametrize(
    "task, change, said",
    [
        ("passkey", {"context": None}, "passkey.jsonl, line 1: context"),
        ("passkey", {"answer": []}, "line 1: answer: is empty"),
        ("code_debug", {"options": ["a"]}, "line 1: options: code_debug needs four"),
        ("longbook_choice_eng", {"answer": ["e"]}, "line 1: options: longbook_choice_eng needs four, the answer among"),
        ("math_find", {"input": "Which?"}, "line 1: input: 'Which\\?' does not say"),
        ("math_find", {"answer": ["many"]}, "line 1: answer.*'many' is no reference for the metric"),
    ],
)
def test_rows_of_something_else_are_told(task, change, said, tmp_path):
    (tmp_path / f"{task}.jsonl").write_text(json.dumps({**row(task), **change}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=said):
        load(tmp_path, f"kv_infinitebench_{task}")


@pytest.mark.parametrize("answer", [71432, "71432", [71432]])
def test_an_answer_may_be_a_number_or_stand_alone(answer, tmp_path):
    one = {**row("passkey"), "answer": answer}
    (tmp_path / "passkey.jsonl").write_text(json.dumps(one) + "\n", encoding="utf-8")
    (task,) = load(tmp_path, "kv_infinitebench_passkey").values()
    assert task.scored(" 71432", task.eval_docs[0]) == {"score": 1.0}


@pytest.mark.parametrize(
    "metadata, said",
    [
        ({"infinitebench_dir": None}, "where is InfiniteBench"),
        ({"infinitebench_dir": "/nowhere"}, "infinitebench_dir=/nowhere: passkey.jsonl is not in"),
        ({"infinitebench_dir": "hub@main"}, "name a commit"),
        ({"infinitebench_dri": "x"}, "did you mean 'infinitebench_dir'"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_line(metadata, said, folder):
    with pytest.raises(UserError, match=said) as error:
        load(folder, "kv_infinitebench_passkey", **metadata)
    assert "\n" not in str(error.value)


def test_a_run_says_the_share_that_is_compressed(folder):
    args = {"pretrained": "kv-tiny", "method": "snapkv", "keep_ratio": 0.3, "question_in_prompt": False}
    options = {"metadata": {"infinitebench_dir": str(folder)}, "limit": 1, "gen_kwargs": {"max_gen_toks": 2}}
    run = harness.run("kvcompressed", args, ["kv_infinitebench"], **options)
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    for name in ASKED:
        head, tail = by_hand(name, row(name))
        whole = tokenizer(head + tail, return_offsets_mapping=True)
        begins = len(head + tail) - len(tail.lstrip())
        before = sum(end <= begins for _, end in whole["offset_mapping"])
        stats = run.results["config"]["kv_stats"]["by_task"][f"kv_infinitebench_{name}"]
        assert stats["context_share"]["median"] == pytest.approx(before / len(whole["input_ids"]), abs=2e-4)
        assert stats["compressed_share"] == 1


@pytest.mark.parametrize("name", ["passkey", "math_find", "longbook_choice_eng", "code_debug"])
def test_a_text_that_is_next_to_nothing_stops_the_run(name, tmp_path):
    one = {**row(name), "context": "x"}
    one |= {"options": ["y " * 600, *OPTIONS[1:]]} if one["options"] else {"input": one["input"] + "why? " * 300}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(one) + "\n", encoding="utf-8")
    args = {"pretrained": "kv-tiny", "method": "snapkv", "keep_ratio": 0.3, "question_in_prompt": False}
    with pytest.raises(UserError, match=re.escape("at least 10% must stand before it")):
        harness.run("kvcompressed", args, [f"kv_infinitebench_{name}"], metadata={"infinitebench_dir": str(tmp_path)})
