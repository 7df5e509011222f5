"""The tasks: their documents, and runs under our model and under lm-eval's own."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pytest
import yaml
from needle_tokenizers import load

from kv_lm_eval import plugin, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.tasks.needle import functions, tasks
from kv_lm_eval.tasks.needle.haystack import Counter

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(tasks.__file__).parent
NAMES = sorted(file.stem for file in HERE.glob("kv_needle*.yaml") if file.stem != "kv_needle_all")
SMALL = {"lengths": [1024], "depths": [50], "samples_per_cell": 1, "pretrained": "kv-tiny"}


def config(name: str) -> dict:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: getattr(functions, node.value.split(".")[1]))
    base = yaml.load((HERE / "_kv_needle_yaml").read_text(), Loader)
    return {**base, **yaml.load((HERE / f"{name}.yaml").read_text(), Loader)}


def documents(name: str, **metadata) -> list[dict]:
    return config(name)["custom_dataset"](**{**SMALL, **metadata})["test"].to_list()


def run(tasks_: list[str], model: str = "kvcompressed", **settings):
    args = {"pretrained": tiny.path(), "dtype": "float32", **({"method": "full"} if model != "hf" else {}), **settings}
    metadata = args.pop("metadata", {})
    with plugin.only_our_tasks():
        return lm_eval.simple_evaluate(
            model=model,
            model_args=args,
            tasks=tasks_,
            batch_size=4,
            bootstrap_iters=0,
            device="cpu",
            metadata={k: v for k, v in {**SMALL, **metadata}.items() if k != "pretrained"},
        )


def test_all_tasks_are_in_the_group():
    assert sorted(yaml.safe_load((HERE / "kv_needle_all.yaml").read_text())["task"]) == NAMES
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_has_the_room_that_the_length_leaves_for_it(name):
    for row in documents(name):
        room = config(name)["generation_kwargs"]["max_gen_toks"]
        assert row["length_tokens"] + room <= row["context_length"]
        assert row["length_tokens"] + room >= row["context_length"] - 40


@pytest.mark.parametrize("name", NAMES)
def test_the_context_holds_all_that_is_expected_and_the_question_comes_after_it(name):
    (row,) = documents(name)
    assert all(answer.lower() in row["context"].lower() for answer in row["expected"])
    assert functions.prompt(row) == row["context"] + row["question"]
    assert row["question"] not in row["context"]
    assert [m["metric"] for m in config(name)["metric_list"]][: len(row["scores"])] == row["scores"]


@pytest.mark.parametrize("name", NAMES)
def test_documents_depend_on_no_setting_of_a_method(name):
    other = documents(name, method="random", seed=3, max_capacity_prompt=9, window_size=3)
    assert documents(name, method="full") == other


GOLDEN = json.loads((Path(__file__).parent / "golden" / "prompts.json").read_text())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("kv_needle_cwe",)])
@pytest.mark.parametrize("wording", tasks.WORDINGS)
def test_prompts_are_the_golden_ones(name, wording, tmp_path):
    """With a haystack of our own: Python's help differs between versions."""
    (tmp_path / "hay.txt").write_text(" ".join(f"This is sentence number {i} of the hay." for i in range(400)))
    (row,) = documents(name, lengths=[400], haystack_dir=str(tmp_path), wording=wording)
    prompt = row["context"] + row["question"] + " | " + row["gen_prefix"]
    assert {"prompt": prompt, "expected": row["expected"]} == GOLDEN[f"{name}/{wording}"]


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("numbers", r"[1-9]\d{6}"),
        ("words", r"[a-z]+-[a-z]+"),
        ("uuids", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
    ],
)
def test_needles_are_numbers_words_or_uuids(kind, pattern):
    import re

    rows = documents("kv_needle_magic", needle_type=kind, samples_per_cell=4)
    assert all(re.fullmatch(pattern, row["expected"][0]) for row in rows)
    assert len({row["expected"][0] for row in rows}) == 4


def test_multikey_asks_for_one_of_several_and_multivalue_for_all():
    (key,) = documents("kv_needle_multikey", num_keys=6)
    assert len(key["needle_ids"]) == 6 and len(key["expected"]) == 1
    (value,) = documents("kv_needle_multivalue", num_values=3)
    assert len(value["expected"]) == 3 == value["context"].count("One of the special magic numbers")
    (query,) = documents("kv_needle_multiquery", num_queries=2)
    assert len(query["expected"]) == 2 and " and " in query["question"]


def test_several_facts_stand_between_their_depth_and_the_end():
    (row,) = documents("kv_needle_multi")
    assert row["needle_depth_percents"] == sorted(row["needle_depth_percents"])
    assert row["needle_depth_percents"] == pytest.approx([50, 66.7, 83.3], abs=8)


def test_a_haystack_of_needles_has_the_asked_one_once():
    (row,) = documents("kv_needle_multikey", haystack="needles", num_keys=1)
    key = row["needle_ids"][0].split(":")[1]
    assert row["context"].count("The special magic number for") > 25
    assert row["context"].count(f"for {key} is") == 1


def test_the_twin_without_the_needle_is_as_long_and_does_not_know():
    with_needle, without = documents("kv_needle_magic", floor=True)
    assert without["needle_removed"] and not with_needle["needle_removed"]
    assert without["expected"][0] not in without["context"]
    assert abs(without["length_tokens"] - with_needle["length_tokens"]) <= 12


def test_common_words_come_as_often_as_they_should():
    (row,) = documents("kv_needle_cwe")
    words = row["context"].split("\n")[1].split()[1::2]
    assert {words.count(word) for word in row["expected"]} == {6}
    assert {words.count(word) for word in set(words) - set(row["expected"])} == {1}
    (row,) = documents("kv_needle_fwe")
    words = row["context"].split()
    first, second, third = (words.count(word) for word in row["expected"])
    rest = {w for w in words if len(w) == 6 and words.count(w) >= third and w not in ("coded", "Memorize")}
    assert first > second > third and rest - set(row["expected"]) <= {"coded."}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"length": [1024]}, "unknown setting 'length'.*did you mean 'lengths'"),
        ({"depths": [120]}, "0 .beginning. to 100"),
        ({"lengths": []}, "one or more numbers"),
        ({"needle_type": "letters"}, "not one of: numbers, words, uuids"),
        ({"samples_per_cell": 0}, "at least 1"),
        ({"reserved_tokens": -1}, "0 or more"),
        ({"lengths": [300], "reserved_tokens": 300}, "leaves no prompt"),
        ({"pretrained": None}, "found none"),
    ],
)
def test_mistakes_are_told(metadata, message):
    with pytest.raises(UserError, match=message):
        documents("kv_needle_magic", **metadata)


def test_words_that_do_not_fit_are_told():
    with pytest.raises(UserError, match="too few words"):
        documents("kv_needle_cwe", lengths=[200])
    with pytest.raises(UserError, match="is for the magic tasks"):
        documents("kv_needle", haystack="needles")


def test_stock_and_full_answer_alike_and_find_the_needle_with_the_length_they_state():
    metadata = {"lengths": [256, 512], "depths": [0, 60], "floor": True}
    stock = run(["kv_needle_magic"], model="hf", metadata=metadata)
    ours = run(["kv_needle_magic"], metadata=metadata)
    answers = [[s["resps"] for s in r["samples"]["kv_needle_magic"]] for r in (stock, ours)]
    assert answers[0] == answers[1]
    for result in (stock, ours):
        scores = result["results"]["kv_needle_magic"]
        assert (scores["contains,none"], scores["floor,none"]) == (1, 0)
        assert [c["samples"] for c in scores["cells,none"]] == [1, 1, 1, 1]
        json.dumps(scores["cells,none"])
    counter = Counter(load("kv-tiny"))
    for sample in ours["samples"]["kv_needle_magic"]:
        assert counter.count(sample["arguments"][0][0]) == sample["doc"]["length_tokens"]


def test_every_task_runs_compressed_and_a_window_loses_what_lies_before_it():
    settings = {"method": "streaming_llm", "window_size": 124}
    results = run(["kv_needle_all"], metadata={"lengths": [768], "depths": [0]}, **settings)["results"]
    assert all(name in results for name in NAMES)
    assert results["kv_needle_magic"]["contains,none"] == 0


def test_lengths_hold_with_the_bos_token_that_lm_eval_is_told_to_add():
    (without,) = documents("kv_needle_magic", add_bos_token=False)
    prompt = functions.prompt(without) + " " + without["gen_prefix"]
    assert without["length_tokens"] == len(load("kv-tiny")(prompt, add_special_tokens=False).input_ids)
