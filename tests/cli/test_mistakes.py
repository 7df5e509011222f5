"""Whatever is wrong in a command line or a file that it names: one line, no traceback, status 2, before any weights."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kv_lm_eval import cli, harness

FULL = ["--model", "kvcompressed", "--model_args", "pretrained=kv-tiny,method=full", "--tasks", "kv_quickstart_needle"]


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with one file of each broken kind; lm-eval's own run would be an error of the test."""
    from lm_eval._cli.harness import HarnessCLI

    def execute(self: Any, args: Any) -> None:
        raise RuntimeError("this went on to lm-eval")

    monkeypatch.setattr(HarnessCLI, "execute", execute)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file, not a folder")
    Path("binary.yaml").write_bytes(bytes(range(128, 256)))
    Path("broken.yaml").write_text("methods: [full\ntasks: }")
    Path("list.yaml").write_text("- 1\n- 2")
    Path("empty.yaml").write_text("")
    Path("damaged_rank0.db").write_bytes(bytes(range(256)) * 16)
    Path("damaged_rank1.db").mkdir()
    Path("sweep.yaml").write_text("models: [kv-tiny]\ntasks: [kv_needle_magic]\nmethods: [full]\n")
    return tmp_path


def said(arguments: list[str], capsys: Any) -> tuple[int, list[str]]:
    """The status, and the lines on stderr that are not a log's."""
    try:
        status = cli.main(arguments)
    except SystemExit as end:  # argparse's own
        status = int(end.code or 0)
    return status, [line for line in capsys.readouterr().err.splitlines() if line.strip()]


RUN = {
    "output path a file": [*FULL, "--output_path", "file"],
    "output path under a file": [*FULL, "--output_path", "file/below"],
    "json output path under a file": [*FULL, "--output_path", "file/results.json"],
    "use_cache under a file": [*FULL, "--use_cache", "file/answers"],
    "a damaged use_cache": [*FULL, "--use_cache", "damaged"],
    "limit 0": [*FULL, "--limit", "0"],
    "limit negative": [*FULL, "--limit", "-1"],
    "limit nan": [*FULL, "--limit", "nan"],
    "limit infinite": [*FULL, "--limit", "inf"],
    "limit one and a half": [*FULL, "--limit", "1.5"],
    "limit a word": [*FULL, "--limit", "few"],
    "metadata no JSON": [*FULL, "--metadata", "{lengths: [256]"],
    "metadata no pair": [*FULL, "--metadata", "lengths"],
    "gen_kwargs no pair": [*FULL, "--gen_kwargs", "temperature"],
    "samples no JSON": [*FULL, "--samples", "{1"],
    "an unknown option": [*FULL, "--metadatta", "{}"],
    "an option without its value": [*FULL, "--limit"],
    "no tasks": FULL[:4],
    "no task named": [*FULL[:4], "--tasks"],
    "tasks empty": [*FULL[:5], ""],
    "tasks blank": [*FULL[:5], " "],
    "tasks a comma": [*FULL[:5], ","],
    "output path empty": [*FULL, "--output_path", ""],
    "output path empty, one word": [*FULL, "--output_path="],
    "use_cache empty": [*FULL, "--use_cache", ""],
    "include path empty": [*FULL, "--include_path", ""],
    "include path nowhere": [*FULL, "--include_path", "nowhere"],
    "include path a file": [*FULL, "--include_path", "file"],
    "config empty": ["run", "--config", ""],
    "an unknown task of ours": [*FULL[:5], "kv_quickstart_nedle"],
    "an unknown model": ["--model", "kvcompresed", *FULL[2:]],
    "no model_args": [*FULL[:2], *FULL[4:]],
    "no pretrained": [*FULL[:3], "method=full", *FULL[4:]],
    "no method": [*FULL[:3], "pretrained=kv-tiny", *FULL[4:]],
    "a misspelt method": [*FULL[:3], "pretrained=kv-tiny,method=snapkw", *FULL[4:]],
    "a misspelt setting": [*FULL[:3], "pretrained=kv-tiny,method=snapkv,budgett=8", *FULL[4:]],
    "a length below 1": [*FULL[:3], "pretrained=kv-tiny,method=full,max_length=-3", *FULL[4:]],
    "a length beyond all": [*FULL[:3], "pretrained=kv-tiny,method=full,max_length=1e12", *FULL[4:]],
    "a length of half a token": [*FULL[:3], "pretrained=kv-tiny,method=full,max_length=10.5", *FULL[4:]],
    "a pair without its sign": [*FULL[:3], "pretrained", *FULL[4:]],
    "a folder that is not there": [*FULL[:3], "pretrained=./nowhere,method=full", *FULL[4:]],
    "log_samples without output_path": [*FULL, "--log_samples"],
    "batch size a word": [*FULL, "--batch_size", "many"],
    "batch size 0": [*FULL, "--batch_size", "0"],
    "few-shot negative": [*FULL, "--num_fewshot", "-1"],
    "a device that is none": [*FULL, "--device", "gpu3"],
    "seed a word": [*FULL, "--seed", "x"],
    "no such config": ["run", "--config", "nowhere.yaml"],
    "a binary config": ["run", "--config", "binary.yaml"],
    "a broken config": ["run", "--config", "broken.yaml"],
    "a config that is a list": ["run", "--config", "list.yaml"],
    "an empty config": ["run", "--config", "empty.yaml"],
    "a config that is a folder": ["run", "--config", "."],
    "an unknown command": ["repport", "out"],
    "a command alone": ["repport"],
    "an unknown method to explain": ["methods", "snapkw"],
    "two methods to explain": ["methods", "snapkv", "h2o"],
}
TUNE = [*FULL[2:3], "pretrained=kv-tiny,method=snapkv", *FULL[4:], "--budgets", "64"]
OTHERS = {
    "sweep: no such file": ["sweep", "nowhere.yaml"],
    "sweep: a binary file": ["sweep", "binary.yaml"],
    "sweep: a broken file": ["sweep", "broken.yaml"],
    "sweep: a list": ["sweep", "list.yaml"],
    "sweep: an empty file": ["sweep", "empty.yaml"],
    "sweep: a folder": ["sweep", "."],
    "sweep: no file": ["sweep"],
    "sweep: --set without a value": ["sweep", "sweep.yaml", "--set", "limit"],
    "sweep: --set of broken YAML": ["sweep", "sweep.yaml", "--set", "limit=[1"],
    "sweep: --set of binary": ["sweep", "sweep.yaml", "--set", "limit=\x00\x01"],
    "sweep: --set to 0": ["sweep", "sweep.yaml", "--set", "limit=0"],
    "sweep: --set to a word": ["sweep", "sweep.yaml", "--set", "limit=few"],
    "sweep: --set of a tag": ["sweep", "sweep.yaml", "--set", "limit=!!python/object/apply:os.getcwd []"],
    "sweep: output path a file": ["sweep", "sweep.yaml", "--output_path", "file"],
    "sweep: output path under a file": ["sweep", "sweep.yaml", "--output_path", "file/below"],
    "sweep: output path empty": ["sweep", "sweep.yaml", "--output_path", ""],
    "sweep: an empty name": ["sweep", ""],
    "report: an empty name": ["report", ""],
    "report: output path empty": ["report", ".", "--output_path="],
    "tune: output path empty": ["tune", *TUNE, "--output_path", ""],
    "quickstart: output path empty": ["quickstart", "--output_path", ""],
    "sweep: a device that is none": ["sweep", "sweep.yaml", "--set", "device=mars"],
    "sweep: no worker": ["sweep", "sweep.yaml", "--num_workers", "0"],
    "tune: a device that is none": ["tune", *TUNE, "--device", "mars"],
    "sweep: an unknown option": ["sweep", "sweep.yaml", "--dryrun"],
    "report: no such folder": ["report", "nowhere"],
    "report: a file": ["report", "file"],
    "report: nothing in it": ["report", "."],
    "report: output path a file": ["report", ".", "--output_path", "file"],
    "report: output path under a file": ["report", ".", "--output_path", "file/below"],
    "report: no folder": ["report"],
    "tune: metadata no JSON": ["tune", *TUNE, "--metadata", "{1"],
    "tune: metadata a list": ["tune", *TUNE, "--metadata", "[1]"],
    "tune: output path a file": ["tune", *TUNE, "--output_path", "file"],
    "tune: a misspelt method": ["tune", TUNE[0], "pretrained=kv-tiny,method=snapkw", *TUNE[2:]],
    "tune: an unknown task": ["tune", *TUNE[:3], "kv_needle_magix", *TUNE[4:]],
    "tune: a range of one number": ["tune", *TUNE, "--score_range", "1"],
    "tune: no tasks": ["tune", *TUNE[:2], *TUNE[4:]],
    "quickstart: limit 0": ["quickstart", "--limit", "0"],
    "quickstart: limit negative": ["quickstart", "--limit", "-2"],
    "quickstart: limit a word": ["quickstart", "--limit", "few"],
    "quickstart: an unknown method": ["quickstart", "--methods", "full,snapkw"],
    "quickstart: output path a file": ["quickstart", "--output_path", "file"],
}


@pytest.mark.parametrize("arguments", [*RUN.values(), *OTHERS.values()], ids=[*RUN, *OTHERS])
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], capsys: Any) -> None:
    status, lines = said(arguments, capsys)
    assert status == 2
    assert len(lines) == 1 and " stopped: " in lines[0] and "Traceback" not in lines[0], lines
    assert "Error:" not in lines[0] and "functools" not in lines[0]


def test_what_is_right_goes_on_to_lm_eval(capsys: Any) -> None:
    status, lines = said([*FULL, "--limit", "0.5", "--output_path", "new/folder", "--batch_size", "auto:4"], capsys)
    assert status == 1 and "this went on to lm-eval" in lines[-1]
    assert Path("new/folder").is_dir() and not list(Path("new/folder").iterdir())


def test_two_processes_with_one_document_are_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, lines = said([*FULL, "--limit", "1"], capsys)
    assert status == 2 and "without a document" in lines[0]


def test_a_misspelt_method_is_told_without_torch() -> None:
    code = (
        "import sys; from kv_lm_eval import cli; status = cli.main(sys.argv[1:]); "
        "print(status, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    for arguments in (RUN["a misspelt method"], ["methods", "snapkw"], OTHERS["tune: a misspelt method"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines() == ["2 []"] and "did you mean 'snapkv'" in done.stderr


def test_names_of_the_model_s_arguments_are_read_without_importing_it() -> None:
    from lm_eval.models.huggingface import HFLM

    assert harness.hf_arguments() == set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}


def test_an_unforeseen_error_is_a_line_that_names_a_file(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    status, lines = said(FULL, capsys)
    assert status == 1 and len(lines) == 1
    trace = Path(lines[0].partition("where it happened: ")[2].partition(")")[0])
    assert "this went on to lm-eval" in trace.read_text()
    trace.unlink()
    monkeypatch.setenv("KV_LM_EVAL_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        cli.main(FULL)


def test_answers_are_lost_only_where_some_were_given(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from lm_eval import evaluator
    from lm_eval._cli.harness import HarnessCLI

    assert said(FULL, capsys)[1][0].endswith("Nothing had been run.")

    def evaluate(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, args: evaluator.evaluate())
    assert "in the middle" in (line := said(FULL, capsys)[1][0]) and "Nothing of it is kept; with --use_cache" in line
    assert evaluator.evaluate is evaluate, "what was put around lm-eval's is taken off again"


@pytest.mark.parametrize("reader", ["methods", "--help"])
def test_a_list_that_nobody_reads_to_its_end_is_no_error(reader: str) -> None:
    command = f"{sys.executable} -m kv_lm_eval {reader} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=dict(os.environ), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_user_error_under_lm_eval_s_own_command_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'lm_eval'; import kv_lm_eval.plugin as p; p._say_mistakes_in_a_line(); "
        "from kv_lm_eval.errors import UserError; raise UserError('method=x is not known')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == "\nlm_eval stopped: method=x is not known\n"
    other = subprocess.run(
        [sys.executable, "-c", code.replace("'lm_eval'", "'mine.py'")], capture_output=True, text=True
    )
    assert other.returncode == 1 and "Traceback" in other.stderr, "a program that imports lm-eval keeps its tracebacks"


def test_json_of_the_sweep_is_the_last_line(capsys: Any) -> None:
    """A reader of the last line gets JSON or nothing."""
    assert cli.main(["sweep", "sweep.yaml", "--output_path", "file"]) == 2
    out = capsys.readouterr().out.splitlines()
    assert not out or json.loads(out[-1])
