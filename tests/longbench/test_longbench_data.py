"""Rows come from a folder, a zip or the hub, in their order; what is missing says where to get it."""

import json
import zipfile

import pytest

from kv_lm_eval.errors import UserError
from kv_lm_eval.tasks.longbench_tasks import data

ROW = {"input": "q", "context": "c", "answers": ["a"], "length": 3, "dataset": "trec", "language": "en",
       "all_classes": ["a", "b"], "_id": "x"}  # fmt: skip


def line(**changes):
    return json.dumps({**ROW, **changes}, ensure_ascii=False) + "\n"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(data.VARIABLE, raising=False)
    data._download.cache_clear()


def test_rows_of_a_folder_of_its_data_folder_and_of_the_zip_are_the_same(tmp_path, monkeypatch):
    text = line(context="one\u2028line") + line(input="second", all_classes=None)
    (tmp_path / "trec.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "unpacked" / "data").mkdir(parents=True)
    (tmp_path / "unpacked" / "data" / "trec.jsonl").write_text(text, encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/trec.jsonl", text)
        archive.writestr("data/trec_e.jsonl", line(length=9))
    rows, source = data.load_rows("trec", str(tmp_path))
    assert [row["input"] for row in rows] == ["q", "second"]
    assert [row["row"] for row in rows] == [0, 1]
    assert rows[0]["context"] == "one\u2028line" and rows[1]["all_classes"] is None
    assert source == str(tmp_path)
    assert data.load_rows("trec", str(tmp_path / "unpacked"))[0] == rows
    assert data.load_rows("trec", str(tmp_path / "data.zip"))[0] == rows
    assert data.load_rows("trec_e", str(tmp_path / "data.zip"))[0][0]["length"] == 9
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    assert data.load_rows("trec")[0] == rows


def test_a_missing_file_says_what_is_there_and_where_to_get_it(tmp_path):
    (tmp_path / "trec_e.jsonl").write_text(line(), encoding="utf-8")
    with pytest.raises(UserError, match="it holds trec_e .did you mean 'trec_e'") as error:
        data.load_rows("trec", str(tmp_path))
    assert data.REVISION in str(error.value) and "longbench_dir" in str(error.value)
    with pytest.raises(UserError, match="there are no jsonl files"):
        data.load_rows("trec", str(tmp_path / "nowhere"))


def test_without_a_folder_and_without_the_hub_both_ways_are_named(monkeypatch):
    def no_hub(*args, **kwargs):
        raise OSError("offline mode is enabled\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_hub)
    with pytest.raises(UserError, match="offline mode is enabled") as error:
        data.load_rows("trec")
    assert "data.zip" in str(error.value) and data.VARIABLE in str(error.value)


def test_the_hub_is_asked_once_for_the_pinned_file_whose_hash_is_checked(tmp_path, monkeypatch):
    import hashlib

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/trec.jsonl", line())
    asked = []

    def hub(repository, name, repo_type, revision):
        asked.append((repository, name, repo_type, revision))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    with pytest.raises(UserError, match="delete it and run again"):
        data.load_rows("trec")
    asked.clear()
    monkeypatch.setattr(data, "SHA256", hashlib.sha256((tmp_path / "data.zip").read_bytes()).hexdigest())
    for _ in range(2):
        rows, source = data.load_rows("trec")
        assert len(rows) == 1 and source == f"THUDM/LongBench@{data.REVISION}"
    assert asked == [("THUDM/LongBench", "data.zip", "dataset", data.REVISION)]


@pytest.mark.parametrize("text, message", [("{", "line 1"), (line() + '{"input": 1}\n', "line 2"), ("", "no rows")])
def test_a_file_that_is_not_longbench_says_which_line(tmp_path, text, message):
    (tmp_path / "trec.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        data.load_rows("trec", str(tmp_path))
