"""kv_ruler as lm-eval loads it: what can run runs, what cannot is named, rows of any layout are checked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from kv_lm_eval import files, harness, plugin
from kv_lm_eval.errors import UserError
from kv_lm_eval.tasks.needle.ruler import data, report, split
from kv_lm_eval.tasks.needle.ruler.task import Documents

pytestmark = pytest.mark.filterwarnings("ignore")
plugin.install()
FOLDER = Path(data.__file__).parent
OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
QAS = [[{"question": f"Which is {i}?", "answers": [{"text": f"Text {i}"}], "is_impossible": False}] for i in range(30)]
SQUAD = {"data": [{"paragraphs": [{"context": f"Text {i} of many.", "qas": qas}]} for i, qas in enumerate(QAS)]}
HOTPOT = [
    {"question": f"Who is {i}?", "answer": f"Mr {i}", "context": [[f"T{i}", [f"Mr {i} is here."]]]} for i in range(30)
]


def load(*names: str, **metadata):
    told = {"tokenizer": "kv-tiny", "lengths": [1200], **metadata}
    with harness.task_manager(names, None, told) as manager:
        return manager.load(list(names))


def row(task: str = "vt", **changes) -> dict:
    made = {
        "context": "a b c ",
        "question": "Q? ",
        "answer_prefix": "Answer:",
        "answer": ["A"],
        "task": task,
        "max_new_tokens": split.MAX_NEW_TOKENS[split.kind(task)],
    }
    return {**made, **changes}


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return file


# ---------------------------------------------------------------------------------------------- groups


def test_a_group_runs_what_can_run_and_names_the_rest(caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load("kv_ruler")
    assert {name.removeprefix("kv_ruler_") for name in loaded["tasks"]} == set(OFFLINE)
    assert loaded["group_map"]["kv_ruler"] == list(loaded["groups"]["kv_ruler"].child_names)
    assert set(loaded["group_map"]["kv_ruler"]) == set(loaded["tasks"])
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 3 and all("\n" not in line for line in said)
    assert any("kv_ruler_niah_single_2" in line and "PaulGrahamEssays.json" in line for line in said)
    assert any("kv_ruler_qa_1" in line and "squad.json" in line for line in said)


def test_a_task_asked_for_by_its_name_stops_instead():
    with pytest.raises(UserError, match="kv_ruler_qa_2 needs hotpotqa.json"):
        load("kv_ruler_qa_2")
    with pytest.raises(UserError, match="kv_ruler_qa_1 needs squad.json"):
        load("kv_ruler_vt", "kv_ruler_qa_1")


def test_nothing_that_can_run_stops():
    with pytest.raises(UserError, match="kv_ruler_.* longer lengths|kv_ruler_.* needs"):
        load("kv_ruler", lengths=[64])


def test_with_rulers_files_all_13_run(tmp_path):
    text = " ".join(f"Sentence {i} says so." for i in range(900))
    files.write_json(tmp_path / "PaulGrahamEssays.json", {"text": text})
    files.write_json(tmp_path / "squad.json", SQUAD)
    files.write_json(tmp_path / "hotpotqa.json", HOTPOT)
    loaded = load("kv_ruler", ruler_json=str(tmp_path), lengths=[2600], ruler_samples=40)
    assert [name.removeprefix("kv_ruler_") for name in loaded["tasks"]] == list(split.TASKS)
    for name, task in loaded["tasks"].items():
        assert len(task.eval_docs) == (30 if "_qa_" in name else 40)
        doc = task.eval_docs[0]
        assert doc["task"] == name.removeprefix("kv_ruler_") and doc["answer"]
        assert all(answer in doc["context"] for answer in doc["answer"])
        assert split.row(doc["task"], split.whole(doc), doc["answer"]) == {k: doc[k] for k in split.Row.__annotations__}
        assert task.asking.counter.count(split.whole(doc)) <= 2600


def test_the_essays_may_be_a_folder_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"Sentence {i} says so." for i in range(900)), encoding="utf-8")
    (task,) = load("kv_ruler_niah_multikey_1", haystack_dir=str(tmp_path), lengths=[2600])["tasks"].values()
    assert task.eval_docs[0]["context"].count("One of the special magic numbers for") == 4


@pytest.mark.parametrize("content", [{"data": [{"paragraphs": 3}]}, {"rows": []}, []])
def test_a_data_set_in_another_form_is_told(content, tmp_path):
    files.write_json(tmp_path / "squad.json", content)
    with pytest.raises(UserError, match="squad.json is not in the form"):
        load("kv_ruler_qa_1", ruler_json=str(tmp_path))


# ---------------------------------------------------------------------------------------------- documents


def test_documents_are_written_when_they_are_asked_for():
    written = []

    def rows():
        for i in range(500):
            written.append(i)
            yield {"row": i}

    documents = Documents(500, rows(), ["row"])
    assert len(documents) == 500 and not written
    assert documents[2] == {"row": 2} and written == [0, 1, 2]
    assert documents[0:2] == [{"row": 0}, {"row": 1}] and len(written) == 3
    with pytest.raises(IndexError):
        documents[500]
    assert [doc["row"] for doc in documents] == list(range(500)) and documents[-1] == {"row": 499}


def test_lengths_take_turns_so_that_a_limit_reaches_all_of_them():
    (task,) = load("kv_ruler_fwe", lengths=[300, 400, 500], ruler_samples=2)["tasks"].values()
    assert [doc["length"] for doc in task.eval_docs] == [300, 400, 500, 300, 400, 500]
    alone = load("kv_ruler_fwe", lengths=[400], ruler_samples=2)["tasks"]["kv_ruler_fwe"].eval_docs
    assert [doc["context"] for doc in alone] == [d["context"] for d in task.eval_docs if d["length"] == 400]
    scores = [task.process_results(doc, [" ".join(doc["answer"][:1])]) for doc in task.eval_docs]
    assert scores[0]["string_match"] == pytest.approx(100 / 3) and scores[0]["string_match_400"][1] == 300
    mean = {m["metric"]: m["aggregation"] for m in task.config.metric_list}["string_match_500"]
    assert mean([(1.0, 500), (0.0, 500), (5.0, 300)]) == 0.5 and mean([(1.0, 300)]) != mean([(1.0, 300)])


def test_a_seed_gives_the_same_prompts_and_another_gives_others():
    first, again, other = (
        load("kv_ruler_vt", ruler_seed=seed, ruler_samples=2)["tasks"]["kv_ruler_vt"].eval_docs[1] for seed in (1, 1, 2)
    )
    assert first == again and first["context"] != other["context"]


def test_a_chat_template_ends_with_the_beginning_of_the_answer():
    (task,) = load("kv_ruler_vt")["tasks"].values()
    doc = task.eval_docs[0]
    head, tail = task.parts(doc, lambda messages, add_generation_prompt: f"<u>{messages[-1]['content']}</u><a>", "Be.")
    assert head == "<u>" + doc["context"] and tail == f"{doc['question'].strip()}</u><a>{doc['answer_prefix'].strip()}"
    assert task.parts(doc) == (doc["context"], doc["question"] + doc["answer_prefix"])


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("place", ["1200/test-0.parquet", "data/1200/x/test.jsonl", "1200.parquet", "1200.jsonl"])
def test_rows_lie_in_the_layout_of_the_hub_or_beside(place, tmp_path):
    rows = [row(), row("fwe"), row(answer=["B"])]
    write_rows(tmp_path / place, rows)
    (task,) = load("kv_ruler_vt", ruler_dir=str(tmp_path))["tasks"].values()
    assert [doc["answer"] for doc in task.eval_docs] == [["A"], ["B"]]
    assert set(load("kv_ruler", ruler_dir=str(tmp_path))["tasks"]) == {"kv_ruler_vt", "kv_ruler_fwe"}


def test_rulers_own_output_is_split_into_rows(tmp_path):
    (task,) = load("kv_ruler_fwe", ruler_samples=1)["tasks"].values()
    doc = task.eval_docs[0]
    whole = {"index": 0, "input": split.whole(doc), "outputs": doc["answer"], "length": 1}
    apart = {**whole, "input": doc["context"] + doc["question"], "answer_prefix": doc["answer_prefix"]}
    write_rows(tmp_path / "1200" / "fwe" / "validation.jsonl", [whole, apart])
    (got,) = load("kv_ruler_fwe", ruler_dir=str(tmp_path))["tasks"].values()
    assert [split.whole(one) for one in got.eval_docs] == [split.whole(doc)] * 2


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"answer": "A"}, "line 1: answer"),
        ({"answer": []}, "line 1: answer and context must not be empty"),
        ({"context": None}, "line 1: context"),
        ({"max_new_tokens": 7}, "line 1: max_new_tokens is 7"),
    ],
)
def test_rows_that_are_none_are_told_with_their_place(changes, said, tmp_path):
    write_rows(tmp_path / "1200.jsonl", [row(**changes)])
    with pytest.raises(UserError, match=said):
        load("kv_ruler_vt", ruler_dir=str(tmp_path))


def test_a_parquet_file_of_something_else_is_told(tmp_path):
    write_rows(tmp_path / "1200.parquet", [{"text": "x"}])
    with pytest.raises(UserError, match="1200.parquet is no parquet file of RULER's rows"):
        load("kv_ruler_vt", ruler_dir=str(tmp_path))
    (tmp_path / "1200.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="1200.parquet is no parquet file of RULER's rows"):
        load("kv_ruler_fwe", ruler_dir=str(tmp_path))


@pytest.mark.parametrize(
    "metadata, said",
    [
        ({"ruler_dri": "x"}, "unknown key 'ruler_dri'.*did you mean 'ruler_dir'"),
        ({"ruler_dir": "/nowhere"}, "/nowhere: there is no such folder"),
        ({"ruler_dir": "hub"}, "name the commit"),
        ({"ruler_dir": "hub@main"}, "name the commit"),
        ({"lengths": []}, "lengths="),
        ({"lengths": [1200, 1200]}, "names a length twice"),
        ({"lengths": "4k"}, "--metadata: lengths"),
        ({"ruler_samples": 0}, "ruler_samples=0"),
        ({"ruler_words": "mine"}, "ruler_words='mine'"),
        ({"protocol": "kvpres"}, "protocol=kvpres.*did you mean 'kvpress'"),
        ({"compress_questions": True}, "compress_questions has no effect"),
        ({"pretrained": "kv-tiny", "lengths": [5000]}, "this model takes 4096 tokens"),
        ({"protocol": "kvpress", "method": "snapkv"}, "add question_in_prompt=False"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_line(metadata, said):
    with pytest.raises(UserError, match=said) as error:
        load("kv_ruler_vt", **metadata)
    assert "\n" not in str(error.value)


def test_prompts_that_fill_the_model_leave_no_room_for_an_answer():
    """fwe's prompts fill their length alone, as officially."""
    loaded = load("kv_ruler", pretrained="kv-tiny", lengths=[4096])
    assert "kv_ruler_fwe" not in loaded["tasks"] and "kv_ruler_cwe" in loaded["tasks"]
    assert "kv_ruler_fwe" in load("kv_ruler_fwe", pretrained="kv-tiny", lengths=[4096], reserved_tokens=50)["tasks"]


def test_every_task_of_rulers_has_a_file_and_the_official_settings():
    for task in split.TASKS:
        config = yaml.safe_load((FOLDER / f"kv_ruler_{task}.yaml").read_text(encoding="utf-8"))
        assert config["task"] == f"kv_ruler_{task}"
    group = yaml.safe_load((FOLDER / "kv_ruler.yaml").read_text(encoding="utf-8"))
    assert group["task"] == [f"kv_ruler_{task}" for task in split.TASKS]


# ---------------------------------------------------------------------------------------------- numbers


def test_the_mean_is_of_all_13_or_of_none():
    same = {"protocol": "kvpress", "lengths": [4096], "compress_questions": False, "data": "d"}
    runs = {f"kv_ruler_{task}": {"task": task, **same} for task in split.TASKS}
    results = {"results": {name: {"string_match,none": 10.0 * i} for i, name in enumerate(runs)}}
    assert report.mean(report.scores(results, runs, 4096)) == 60
    assert f"{'mean of the 13':<18}     60.00" in report.page(results, runs)
    del runs["kv_ruler_cwe"]
    assert report.mean(report.scores(results, runs, 4096)) is None
    assert "no mean of the 13: not run, cwe" in report.page(results, runs)


def test_words_of_the_official_package_are_taken_where_asked(monkeypatch):
    with pytest.raises(UserError, match="pip install wonderwords"):
        monkeypatch.setitem(__import__("sys").modules, "wonderwords", None)
        data._lists.cache_clear()
        load("kv_ruler_cwe", ruler_words="wonderwords")
