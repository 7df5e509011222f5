"""What --metadata asks of our tasks is checked before a document is written: types, sizes, and the model's maximum."""

from __future__ import annotations

import itertools
import json
import time

import pytest

from kv_lm_eval import plugin, tiny
from kv_lm_eval.errors import UserError

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
NAN, INF = float("nan"), float("inf")
KINDS = (None, "abc", "", NAN, INF, -INF, True, False, 0, -1, -5, 1.5, 10**9, 10**12, 1e30, [], [[]], {}, {"a": 1},
         ["abc"], [NAN], [None], [True], [0], [-1], [10**9], [1e300], list(range(1, 200_001)))  # fmt: skip
NEEDLE = ("lengths", "depths", "samples_per_cell", "num_keys", "num_values", "num_queries", "reserved_tokens",
          "needle_seed", "needle_type", "key_type", "wording", "floor", "haystack_dir")  # fmt: skip
FINE = {"lengths": [512], "depths": [50], "samples_per_cell": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("data")
    row = {"input": "q", "context": "c c", "answers": ["a"], "length": 3, "all_classes": ["a", "b"], "_id": "x"}
    (where / "trec.jsonl").write_text(json.dumps(row) + "\n")
    (where / "a.txt").write_text("The boats lay still in the harbour. Nobody had come.\n")
    return where


def load(task: str, **metadata):
    """The documents of a task, and the seconds that they took."""
    from lm_eval.tasks import TaskManager

    with plugin.only_our_tasks():
        index = TaskManager(metadata={"pretrained": tiny.path(), **metadata})
    start = time.process_time()
    return list(index.load([task])["tasks"][task].eval_docs), time.process_time() - start


@pytest.fixture(scope="module")
def index():
    from lm_eval.tasks import TaskManager

    with plugin.only_our_tasks():
        return TaskManager(metadata={})


def one_line(error: UserError, *names: str) -> None:
    said = str(error)
    assert "\n" not in said and len(said) < 3000 or "200" in said, said[:200]
    assert any(name in said for name in names), said[:300]


@pytest.mark.parametrize("setting", NEEDLE)
def test_needle_settings_are_refused_in_one_line_or_serve_a_small_grid(setting):
    from kv_lm_eval.tasks.needle import functions

    for build, value in itertools.product((functions.magic, functions.multivalue), KINDS):
        start = time.process_time()
        try:
            rows = build(**{"pretrained": "kv-tiny", **FINE, setting: value})["test"].to_list()
        except UserError as error:
            one_line(error, setting, "prompt")
        else:
            assert 1 <= len(rows) <= 20
        assert time.process_time() - start < 5, (setting, str(value)[:50])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lengths": [1_000_000_000]}, "at most 10,000,000"),
        ({"lengths": [100_000]}, "this model takes 4096 tokens"),
        ({"lengths": [4097]}, "this model takes 4096 tokens"),
        ({"lengths": [2048], "max_length": 1024}, "this model takes 1024 tokens"),
        ({"lengths": "abc"}, "lengths"),
        ({"samples_per_cell": 1e8}, "prompts of"),
        ({"samples_per_cell": 100_000_000}, "prompts of"),
        ({"depths": list(range(101)) * 1000}, "prompts of"),
        ({"num_values": 5000}, "do not fit into 512 tokens"),
        ({"max_length": "long"}, "max_length='long' is not a number"),
    ],
)
def test_what_the_model_cannot_take_is_told_before_it_is_built(metadata, message):
    from kv_lm_eval.tasks.needle import functions

    for build in (functions.magic, functions.cwe):
        start = time.process_time()
        if build is functions.cwe and "num_values" in metadata:
            continue
        with pytest.raises(UserError, match=message):
            build(**{"pretrained": "kv-tiny", **FINE, **metadata})
        assert time.process_time() - start < 5


def test_a_longer_model_is_believed_and_numbers_may_be_written_as_floats():
    from kv_lm_eval.tasks.needle import functions

    (row,) = functions.magic(**{"pretrained": "kv-tiny", **FINE, "lengths": 6e3, "max_length": 8192})["test"].to_list()
    assert row["context_length"] == 6000
    exact = functions.magic(**{"pretrained": "kv-tiny", **FINE, "depths": [50.0]})["test"].to_list()
    assert exact == functions.magic(**{"pretrained": "kv-tiny", **FINE})["test"].to_list()


def test_more_different_words_than_there_are_end_in_an_error():
    from kv_lm_eval.tasks.needle import tasks

    with pytest.raises(UserError, match="no 9,000 different ones"):
        tasks.different(tasks._words, tasks.seeded("x"), 9000)


@pytest.mark.parametrize(
    "setting", ["text_files", "books", "max_eval_tokens", "prefill_tokens", "strided_length", "stride", "protocol"]
)
def test_perplexity_settings_are_refused_in_one_line_or_serve(setting, folder):
    for value in KINDS:
        metadata = {"text_files": str(folder / "a.txt"), "method": "full", setting: value}
        if setting in ("strided_length", "stride"):
            metadata["protocol"] = "strided"
        if setting == "prefill_tokens":
            metadata["protocol"] = "prefill_then_stream"
        try:
            docs, _ = load("kv_ppl_file", **metadata)
        except UserError as error:
            one_line(error, setting)
        else:
            assert len(docs) == 1 and (value is None or isinstance(value, int) and not isinstance(value, bool))
    with pytest.raises(UserError, match="strided_length=5000 passes the model's maximum of 4096"):
        load("kv_ppl_file", text_files=str(folder / "a.txt"), method="full", protocol="strided", strided_length=5000)


@pytest.mark.parametrize(
    "setting", ["longbench_max_length", "longbench_chat_format", "longbench_dir", "longbench_extra_metrics"]
)
def test_longbench_settings_are_refused_in_one_line_or_serve(setting, folder):
    for value in (*KINDS, "{prompt}{other}", "{prompt", "{}{prompt}"):
        try:
            docs, _ = load("kv_longbench_trec", **{"longbench_dir": str(folder), setting: value})
        except UserError as error:
            one_line(error, setting, "trec.jsonl", "LongBench")
        else:
            assert len(docs) == 1
    for value in (4097, 1e9, INF, NAN, True, 700.5, "1e30"):
        with pytest.raises(UserError, match="longbench_max_length"):
            load("kv_longbench_trec", longbench_dir=str(folder), longbench_max_length=value)
