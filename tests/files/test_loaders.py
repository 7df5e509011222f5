"""Every file that is read back, with each field dropped, emptied and of another type: told in one line, or no matter.

What must be there is taken from the schema of each kind of file; a list by hand beside it says what must never pass.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import pytest

from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import head_profile
from kv_lm_eval.tasks.longbench_tasks import data, predictions, report, rows
from kv_lm_eval.tasks.longbench_tasks.specs import official
from kv_lm_eval.tasks.needle import heatmap

ROW = {"input": "Which?", "context": "A text.", "answers": ["first", "second"], "length": 3, "dataset": "trec",
       "language": "en", "all_classes": ["first", "second"], "_id": "x"}  # fmt: skip
PREDICTION = {"pred": "first", "answers": ["first"], "all_classes": ["first", "second"], "length": 3}
CELL = {"context_length": 256, "document_depth_percent": 50.0, "samples": 2, "length_tokens": 200.5,
        "primary": "contains", "scores": {"contains": 0.5}, "floor": None, "failed": {}}  # fmt: skip
ANSWER = {"context_length": 256, "document_depth_percent": 50.0, "length_tokens": 200, "needle_removed": False,
          "primary": "contains", "failed": None, "scores": {"contains": 1.0}}  # fmt: skip
HEAD = {"type": "mixed", "confidence": 0.5, "window": 8}
PROFILE = {"format": head_profile.FORMAT, "model": "m", "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
           "classifier": {}, "text": {}, "heads": [[HEAD, HEAD]]}  # fmt: skip
RESULTS = {
    "results": {"kv_needle": {"cells,none": [CELL]}, "kv_longbench_trec": {"score,none": 50.0}},
    "configs": {"kv_longbench_trec": {"metadata": {"longbench": {"dataset": "trec", "longbench_e": False,
                                                                 "protocol": "official"}}}},
    "config": {"model": "kvcompressed"},
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, one whole value, its schema, and how it is read."""

    file: str
    value: Any
    schema: Any
    load: Callable[[Path], Any]

    @property
    def lines(self) -> bool:
        return self.file.endswith(".jsonl")

    def write(self, folder: Path, *values: Any) -> Path:
        path = folder / self.file
        path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
        return path


def longbench(path: Path) -> Any:
    return data.load_rows("trec", str(path.parent), official()["trec"])[0]


KINDS = {
    "LongBench rows": Kind("trec.jsonl", ROW, rows.Row, longbench),
    "predictions": Kind("trec.jsonl", PREDICTION, rows.Prediction, predictions.read),
    "LongBench samples": Kind(
        "samples_kv_longbench_trec_d.jsonl",
        {"doc_id": 0, "doc": {k: v for k, v in PREDICTION.items() if k != "pred"}, "resps": [["first"]]},
        predictions.Sample,
        lambda path: list(predictions.from_samples(path)),
    ),
    "needle samples": Kind(
        "samples_kv_needle_d.jsonl", {"cells": ANSWER}, heatmap.Sample, lambda p: heatmap.as_json(heatmap.read([p]))
    ),
    "needle results": Kind(
        "results_d.json", RESULTS, heatmap.Results, lambda p: heatmap.as_json(heatmap.read([p]))
    ),
    "LongBench results": Kind("results_d.json", RESULTS, report.Results, lambda p: report.summary(report.read(p))),
    "head profile": Kind("head_profile.json", PROFILE, head_profile.ProfileFile, head_profile.load),
}  # fmt: skip
OTHERS = (None, 5, -1, 0.5, True, "", "text", [], [1], [None], {}, {"a": 1}, [["x"]])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place within a value at which something else can stand."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...], other: Any = ..., drop: bool = False) -> Any:
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = copy.deepcopy(other)
    return value


def allowed(schema: Any, value: Any) -> bool:
    try:
        pydantic.TypeAdapter(schema).validate_python(value, strict=True)
    except pydantic.ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", KINDS)
def test_every_change_is_told_with_file_line_and_field_or_is_of_a_kind_that_is_allowed(name, tmp_path):
    kind = KINDS[name]
    kind.load(kind.write(tmp_path, kind.value))
    told = 0
    for path in places(kind.value):
        for other in (..., *OTHERS):
            value = changed(kind.value, path, other, drop=other is ...)
            file = kind.write(tmp_path, *([{**kind.value, "_id": "y", "doc_id": 1}] if kind.lines else []), value)
            try:
                kind.load(file)
            except UserError as error:
                said, told = str(error), told + 1
                assert "\n" not in said and len(said) < 700, said
                assert file.name in said or allowed(kind.schema, value) is not False, (path, other, said)
                if not allowed(kind.schema, value):
                    assert file.name in said and str(path[0]) in said, (path, other, said)
                    assert not kind.lines or "line 2" in said, (path, other, said)
            else:
                assert allowed(kind.schema, value), (path, other)
    assert told > 20 or name == "LongBench results"


MUST_NOT_PASS = [
    ("LongBench rows", "context", (..., None, 5, ["A"], {})),
    ("LongBench rows", "input", (..., None, 5, [])),
    ("LongBench rows", "answers", (..., None, "first", [], [1], [None], [["first"]], {"a": 1}, 5)),
    ("LongBench rows", "length", (..., None, "3", True, 3.5, [])),
    ("LongBench rows", "all_classes", (..., None, [], "first", [1], {})),
    ("predictions", "pred", (..., None, 5, ["first"])),
    ("predictions", "answers", (..., None, "first", [1], {})),
    ("predictions", "all_classes", ([], "first", [1])),
    ("predictions", "length", ("3", True, 3.5)),
    ("LongBench samples", "resps", (..., None, [], [[]], "x", [["x"], [1]])),
    ("LongBench samples", "doc", (..., None, {}, "x")),
    ("needle samples", "cells", (..., None, {}, [], "x")),
    ("head profile", "heads", (..., None, [], [[]], [[HEAD]], [[{**HEAD, "window": 0}] * 2], [[{**HEAD, "x": 1}] * 2])),
    ("head profile", "num_heads", (..., None, "2", 3, 2.5)),
]


@pytest.mark.parametrize(("name", "field", "values"), MUST_NOT_PASS)
def test_what_must_never_pass_names_file_line_and_field(name, field, values, tmp_path):
    kind = KINDS[name]
    for other in values:
        value = changed(kind.value, (field,), other, drop=other is ...)
        file = kind.write(tmp_path, value)
        with pytest.raises(UserError) as error:
            kind.load(file)
        said = str(error.value)
        assert file.name in said and field in said and "\n" not in said
        assert not kind.lines or "line 1" in said


@pytest.mark.parametrize("name", KINDS)
def test_bytes_that_mean_the_same_are_read_the_same_and_damaged_ones_are_told(name, tmp_path):
    kind = KINDS[name]
    file = kind.write(tmp_path, kind.value)
    raw, whole = file.read_bytes(), kind.load(file)
    same = [b"\xef\xbb\xbf" + raw, raw.replace(b"\n", b"\r\n"), b"\n\n" + raw + b"\n \n", raw.rstrip(b"\n")]
    for content in same:
        file.write_bytes(content)
        assert getattr(kind.load(file), "heads", kind.load(file)) == getattr(whole, "heads", whole)
    for content in (b"", b"\n", raw[: len(raw) // 2], b"\x00\x01\xff" + raw, raw.replace(b":", b"=", 1), b"[1, 2]\n"):
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            kind.load(file)
        assert "\n" not in str(error.value) and str(error.value).count(file.name) >= 1
    file.unlink()
    with pytest.raises(UserError, match=file.name):
        kind.load(file)


def test_a_row_counts_once_and_its_references_suit_its_metric(tmp_path):
    kind = KINDS["LongBench rows"]
    with pytest.raises(UserError, match=r"trec.jsonl, line 2: _id: 'x' is that of .*trec.jsonl, line 1 too"):
        kind.load(kind.write(tmp_path, ROW, ROW))
    assert len(kind.load(kind.write(tmp_path, ROW, {**ROW, "_id": "y"}, {**ROW, "_id": None}))) == 3
    file = tmp_path / "passage_retrieval_en.jsonl"
    file.write_text(json.dumps({**ROW, "answers": ["the third"], "all_classes": None}))
    with pytest.raises(UserError, match="passage_retrieval_en.jsonl, line 1: answers: 'the third' is no reference"):
        data.load_rows(file.stem, str(tmp_path), official()[file.stem])


def test_fields_that_a_dataset_does_not_use_may_be_absent_and_others_may_be_there(tmp_path):
    file = tmp_path / "lcc.jsonl"
    file.write_text(json.dumps({"context": "x = 1", "answers": ["y = 2"], "length": 3, "mine": [1, 2]}))
    (row,) = data.load_rows("lcc", str(tmp_path), official()["lcc"])[0]
    assert row == {**dict.fromkeys(rows.FIELDS), "context": "x = 1", "answers": ["y = 2"], "length": 3, "mine": [1, 2],
                   "row": 0}  # fmt: skip


def test_predictions_without_a_reference_score_0_as_officially_and_are_told(tmp_path, caplog):
    kind = KINDS["predictions"]
    found = kind.load(kind.write(tmp_path, PREDICTION, {**PREDICTION, "answers": []}))
    assert "trec.jsonl, line 2: answers is empty" in caplog.text
    assert predictions.sample_scores(official()["trec"], found) == [1.0, 0.0]
