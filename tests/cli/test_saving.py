"""Results and samples are in their place and whole, or the run says where they are: for any write that fails."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker

from kv_lm_eval import files, plugin, saving
from kv_lm_eval.errors import UserError

plugin.install()
TASKS = ("one", "two")


def results(use_cache: str | None = None) -> dict[str, Any]:
    sample = {"doc_hash": "a", "prompt_hash": "b", "target_hash": "c", "target": 3, "resps": [["half \ud800"]]}
    return {
        "results": {task: {"alias": task, "acc,none": 0.5} for task in TASKS},
        "configs": {task: {} for task in TASKS},
        "versions": dict.fromkeys(TASKS, 1),
        "n-shot": dict.fromkeys(TASKS, 0),
        "higher_is_better": {task: {"acc": True} for task in TASKS},
        "config": {"use_cache": use_cache},
        "samples": {
            task: [
                {**sample, "doc_id": i, "arguments": [("p", {"until": []})], "filtered_resps": ["x"]} for i in range(3)
            ]
            for task in TASKS
        },
    }


def tracker(output: Path, source: str = "kvcompressed") -> EvaluationTracker:
    made = EvaluationTracker(output_path=str(output))
    made.general_config_tracker.log_experiment_args(source, {"pretrained": "some/model"}, None, None, False)
    return made


def content(folder: Path) -> dict[str, str]:
    """Of every file, by its name without the date."""
    date = re.compile(r"_\d{4}-\d\d-\d\dT[\d-]+\.\d+")
    return {date.sub("", f.name): f.read_text(encoding="utf-8") for f in sorted(folder.rglob("*")) if f.is_file()}


def without_times(found: dict[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = dict(found)
    for name, text in found.items():
        if name.endswith(".json"):
            out[name] = {k: v for k, v in json.loads(text).items() if "time" not in k}
    return out


@pytest.mark.parametrize("path", ["out", "out/mine.json"])
def test_the_files_are_those_that_lm_eval_writes(path: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours" / path, tmp_path / "theirs" / path
    written = saving.save(results(), tracker(ours))
    other, plain = tracker(theirs), results()
    for task in plain["samples"].values():  # half a surrogate pair is what lm-eval cannot write
        for sample in task:
            sample["resps"] = [["half ?"]]
    samples = plain.pop("samples")
    EvaluationTracker.save_results_aggregated.__wrapped__(other, plain, samples)
    for task in TASKS:
        EvaluationTracker.save_results_samples.__wrapped__(other, task, samples[task])
    mine, stock = without_times(content(tmp_path / "ours")), without_times(content(tmp_path / "theirs"))
    assert set(mine) == set(stock) and len(written) == len(mine) == 3
    assert [f for f in tmp_path.rglob("*") if f.name.startswith(".")] == []
    for name in mine:
        if name.endswith(".json"):
            assert mine[name] == stock[name]


class Disk:
    """Fails the n-th write of one kind, and all after it, below a folder."""

    def __init__(self, folder: Path, at: int, code: int) -> None:
        self.folder, self.left, self.code = folder, at, code

    def fails(self, path: Any) -> bool:
        if self.folder not in Path(str(path)).parents:
            return False
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("at", range(3))
def test_whichever_write_fails_everything_is_elsewhere_and_that_is_said(
    at: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output, disk = tmp_path / "out", Disk(tmp_path / "out", at, code)
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if disk.fails(target):
            raise OSError(disk.code, os.strerror(disk.code))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError) as said:
        saving.save(results(), tracker(output))
    message = str(said.value)
    assert os.strerror(code) in message and str(output) in message and "\n" not in message
    rescue = Path(re.search(r"All results and samples are in (\S+) instead", message)[1])  # type: ignore[index]
    found = content(rescue)
    assert {"results.json", "samples_one.jsonl", "samples_two.jsonl"} == set(found)
    assert json.loads(found["results.json"])["results"]["two"]["acc,none"] == 0.5
    assert [len(found[f"samples_{task}.jsonl"].splitlines()) for task in TASKS] == [3, 3]
    assert "0.5" in capsys.readouterr().out, "the scores are printed, since lm-eval now does not"
    for file in output.rglob("*"):  # what is there is whole
        assert file.is_dir() or file.suffix in (".json", ".jsonl")


@pytest.mark.parametrize("use_cache", [None, "cache/answers"])
def test_with_no_room_anywhere_it_says_what_is_left(
    use_cache: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tracker(tmp_path / "out")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
    with pytest.raises(UserError, match="cache/answers_rank0.db" if use_cache else "answers are lost"):
        saving.save(results(use_cache), made)


def test_a_file_in_the_way_of_the_model_s_folder(tmp_path: Path) -> None:
    (tmp_path / "some__model").write_text("in the way")
    with pytest.raises(UserError, match="are in .* instead"):
        saving.save(results(), tracker(tmp_path))
    assert (tmp_path / "some__model").read_text() == "in the way"


def test_a_samples_file_that_lm_eval_cuts_off_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval catches what goes wrong in the middle of a file and only warns."""
    broken = results()
    broken["samples"]["two"][2]["arguments"] = None
    with pytest.raises(UserError, match="could not be written"):
        saving.save(broken, tracker(tmp_path / "out"))


def test_runs_of_other_models_are_left_to_lm_eval(tmp_path: Path) -> None:
    theirs = tracker(tmp_path / "out", source="hf")
    (tmp_path / "out").write_text("a file in the way")
    theirs.save_results_aggregated(results=results(), samples=None)  # a warning and nothing else, as ever
    with saving.of_every_model(), pytest.raises(UserError):
        theirs.save_results_aggregated(results=results(), samples=None)


def test_the_folder_is_tried_before_weights_are_loaded(tmp_path: Path) -> None:
    """Also under `lm_eval`, where the tracker is all that knows it."""
    from kv_lm_eval import KVCompressedLM

    (tmp_path / "file").write_text("")
    made = tracker(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="a part of this path is a file"):
        KVCompressedLM("kv-tiny", method="full")
    del made  # a tracker that is gone is asked for nothing
    saving.check_newest()


def test_what_is_damaged_is_found(tmp_path: Path) -> None:
    written = saving.save(results(), tracker(tmp_path))
    known = saving.fingerprints(written, tmp_path)
    assert saving.damaged(known, tmp_path) is None and saving.unreadable(tmp_path) is None
    for file in written:
        data = file.read_bytes()
        for other in (data[:-2], data[: len(data) // 2], b"", b"\xff" + data):
            file.write_bytes(other)
            assert saving.damaged(known, tmp_path) == file.relative_to(tmp_path).as_posix()
        file.unlink()
        assert saving.damaged(known, tmp_path) == file.relative_to(tmp_path).as_posix()
        file.write_bytes(data)


@pytest.mark.parametrize("cut", [1, 3, 20])
def test_a_line_that_a_kill_cut_off_is_no_line(cut: int, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    for value in ("a", "é" * 40_000, "c" * 20):
        files.append_line(file, json.dumps(value, ensure_ascii=False))
    file.write_bytes(file.read_bytes()[:-cut])
    files.append_line(file, '"d"')
    assert [value for _, value in files.read_jsonl(file)] == ["a", "é" * 40_000, "d"]
