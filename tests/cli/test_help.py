"""Every command has a help of its own, as wide as the terminal; what is misspelt is told before anything slow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kv_lm_eval import cli

RUN = ["run", "--model", "kvcompressed", "--tasks", "kv_quickstart", "--model_args"]
SWEEP = "models: [{pretrained: kv-tiny}]\ntasks: [kv_quickstart]\nmethods: [{method: snpakv}]\n"


def printed(arguments: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", sys.argv)
    try:
        status: Any = cli.main(arguments)
    except SystemExit as end:  # argparse, after a help
        status = end.code
    assert status in (0, None)
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_explains_itself_in_a_terminal_s_width(
    name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed([name, "--help"], capsys, monkeypatch)
    assert text.startswith(f"usage: kv-lm-eval {name}")
    assert not [line for line in text.splitlines() if len(line) > 80]
    assert name not in cli.OF_LM_EVAL or "lm-eval" not in text.replace("kv-lm-eval", "").replace("lm-eval's own", "")


def test_the_list_of_commands_has_each_of_them(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed([], capsys, monkeypatch)
    assert text == printed(["--help"], capsys, monkeypatch)
    listed = {
        line.split()[0] for line in text.partition("`kv-lm-eval COMMAND")[0].splitlines() if line.startswith("  ")
    }
    assert listed == set(cli.COMMANDS)
    assert not [line for line in text.splitlines() if len(line) > 80]


MISSPELT = {
    "a command": (["repport", "out"], "did you mean 'report'"),
    "a method to explain": (["methods", "snpakv"], "did you mean 'snapkv'"),
    "a method to run": ([*RUN, "pretrained=kv-tiny,method=snpakv"], "did you mean 'snapkv'"),
    "a method to try": (["quickstart", "--methods", "full,snpakv"], "snapkv"),
    "a method to tune": (
        ["tune", "--model_args", "pretrained=kv-tiny,method=snpakv", "--tasks", "kv_quickstart", "--budgets", "8"],
        "did you mean 'snapkv'",
    ),
    "a method to time": (["bench", "--random-weights", "tiny-1m", "--methods", "snpakv"], "did you mean 'snapkv'"),
    "a shape to time": (["bench", "--random-weights", "tiny-2m"], "did you mean 'tiny-"),
    "a method of a sweep": (["sweep", "sweep.yaml", "--output_path", "out"], "did you mean 'snapkv'"),
    "a folder to report on": (["report", "nowhere"], "nowhere"),
    "a file to compare": (["compare", "nowhere", "."], "nowhere"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_what_is_misspelt_is_told_before_torch_is_imported(name: str, tmp_path: Path) -> None:
    arguments, said = MISSPELT[name]
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    code = (
        "import sys; from kv_lm_eval import cli; status = cli.main(sys.argv[1:]); "
        "print(status, [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.stdout.splitlines() == ["2 []"], done.stdout + done.stderr
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
