"""Damaged files: the page is made, and either the file is named on it or no number has changed."""

from __future__ import annotations

import codecs
import json
import math
import os
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest
from results import FULL, efficiency, mean_task, perplexity_task, plan, planned, point, run, snapkv

from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import load, page, plots, rows, tables
from kv_lm_eval.reporting.table import as_csv, as_latex, as_markdown
from kv_lm_eval.stats import paired

ROOT = Path(__file__).parents[2]
WRONG = ("x", 2.5, None, [], {})
EVERY = {"full": 4, "of a point": 4}  # files of a kind that is tried whole elsewhere: one damage of four


def tasks_of(shift: float) -> dict:
    """A needle grid that reports its cells, one of places alone, choices, and a long text with its tokens."""
    places = [{"context_length": n, "document_depth_percent": d} for n in (256, 512) for d in (0, 100)] * 2
    nll = [2.0 + shift * (i % 3) for i in range(512 * 3)]
    pair = (-math.fsum(nll), len(nll))
    return {
        "needle": mean_task([1.0, 1.0 - shift] * 4, "found", extra=places),
        "choice": mean_task([1.0, 1.0, 1.0 - shift] * 4),
        "ppl": {**perplexity_task([pair]), "extra": [{"per_token": {"nll": nll}}]},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two loose runs with a group, and a sweep of three points, one of them not started."""
    folder = tmp_path_factory.mktemp("whole")
    spread = {"median": 0.25, "p10": 0.2, "p90": 0.3, "n": 20}
    for i, compression in enumerate((FULL, snapkv())):
        tasks = tasks_of(0.5 * i)
        means = [tasks[t]["value"] for t in ("needle", "choice")]
        group = {"both": {"tasks": ["choice"], "metric": "acc", "value": means[1]}}
        more = {"stats": {"efficiency": efficiency(ttft_s=spread)}, "gen_kwargs": {"until": ["x"]}, "limit": None}
        run(folder / f"loose{i}", compression, tasks, date=i + 1, groups=group, metadata={"n": 3}, **more)
    points = []
    for i, (settings, status) in enumerate([(FULL, "done"), (snapkv(), "done"), (snapkv(128), "failed")]):
        place = folder / "sweep" / "points" / f"p{i}"
        done = status == "done"
        file = run(place / "toy", settings, {"swept": mean_task([1.0, 1.0 - i / 2] * 6)}, date=i + 5) if done else None
        name = str(file.relative_to(place)) if file else None
        points.append(point(place, f"point {i}", status, settings, ["swept"], name, limit=None, metadata={"n": 1}))
    plan(folder / "sweep", [*points, planned("p9", "point 9", snapkv(256), ["swept"])])
    return folder


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals are not what is tested here."""
    monkeypatch.setattr(paired, "DRAWS", 60)
    monkeypatch.setattr(paired, "MIN_DRAWS", 60)


def page_of(folder: Path) -> tuple[str, list[list[str]]]:
    """The page without its pictures, and all numbers in the tables without what rows are called."""
    report = rows.report(*load.read(folder))
    shown = [tables.scores(report), tables.differences(report), tables.speed(report), tables.progress(report)]
    plots.needles.panels_of(report)
    text = page.page(report, [table for table in shown if table], [], folder, "t")
    for table in filter(None, shown):
        assert as_markdown(table) and as_latex(table) and as_csv(table)
    long = tables.every_number(report)
    names = {i for i, (name, _) in enumerate(long.head) if name in ("label", "settings", "method", "model")}
    numbers = [[v.text for i, v in enumerate(row) if i not in names] for row in long.rows]
    numbers += [[v.text for v in row[1:]] for row in tables.speed(report).rows]
    return text, sorted(numbers)


def named(page: str, file: Path) -> bool:
    return escape(str(file)) in page


def places(value, path=()):
    """Every place in a JSON value but the items of lists beyond the first."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(whole_value, path, how):
    """A copy with one place dropped, or holding something else."""
    copy = json.loads(json.dumps(whole_value))
    *above, last = path
    inner = copy
    for key in above:
        inner = inner[key]
    if how is DROPPED:
        del inner[last]
    else:
        inner[last] = how
    return copy


DROPPED = object()


def wrongs(value, path):
    """What to put in a place: nothing, empty things, other types."""
    old = value
    for key in path:
        old = old[key]
    if not (path and isinstance(path[-1], int)):  # a shorter list is another list
        yield DROPPED
    number = isinstance(old, (int, float)) and not isinstance(old, bool)
    for wrong in WRONG:
        if old == "N/A" and isinstance(wrong, float):  # no damage: a number where there was none
            continue
        same = isinstance(wrong, (int, float)) and not isinstance(wrong, bool) if number else type(wrong) is type(old)
        if not same or (wrong in ([], {}) and wrong != old):
            yield wrong
    if isinstance(old, str) and old:
        yield ""


KINDS = {
    "results": "loose1/results_*.json",
    "full": "loose0/results_*.json",
    "of a point": "sweep/points/p1/toy/results_*.json",
    "point": "sweep/points/p1/point.json",
    "failed point": "sweep/points/p2/point.json",
    "plan": "sweep/plan.json",
    "needle": "loose1/samples_needle*",
    "choice": "loose0/samples_choice*",
    "ppl": "loose1/samples_ppl*",
}


def copy_of(whole: Path, tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """A copy of the loose runs or of the sweep, and the file in it."""
    folder = tmp_path / "in"
    for part in whole.iterdir():
        if part.name.startswith(KINDS[kind][:5]):
            shutil.copytree(part, folder / part.name)
    (file,) = folder.glob(KINDS[kind])
    return folder, file


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_field_is_named_or_changes_no_number(whole, tmp_path, kind):
    folder, file = copy_of(whole, tmp_path, kind)
    before_page, before = page_of(folder)
    assert "Files left out" not in before_page
    text = file.read_text()
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    value = json.loads(lines[0])
    tried = silent = 0
    missed = []
    damages = [(path, wrong) for path in places(value) for wrong in wrongs(value, path)]
    for path, wrong in damages[:: EVERY.get(kind, 1)]:
        first = json.dumps(changed(value, path, wrong))
        file.write_text("\n".join([first, *lines[1:]]) + "\n")
        tried += 1
        page, numbers = page_of(folder)
        if not named(page, file):
            silent += 1
            if numbers != before:
                missed.append((path, "dropped" if wrong is DROPPED else wrong))
    assert not missed, missed
    assert tried > 40 and silent < tried


DAMAGE = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "cut at a line's end": lambda raw: raw[: raw.rfind(b"\n", 0, len(raw) // 2) + 1] or b"",
    "empty": lambda raw: b"",
    "blank": lambda raw: b" \n\n",
    "binary": lambda raw: bytes(range(256)) * 4,
    "zeros": lambda raw: b"\0" * len(raw),
    "utf-16": lambda raw: codecs.BOM_UTF16_LE + raw.decode().encode("utf-16-le"),
    "latin-1": lambda raw: raw.replace(b"toy", b"t\xf6y", 1).replace(b"question", b"fr\xe4ge", 1),
    "a list": lambda raw: b"[]\n",
    "a number": lambda raw: b"5\n",
    "twice": lambda raw: raw + raw,
    "deep": lambda raw: b"[" * 100_000,
    "a long number": lambda raw: b"9" * 5000,
    "null": lambda raw: b"null\n",
    "a page": lambda raw: b"<!DOCTYPE html><html></html>",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named_and_the_rest_stands(whole, tmp_path, kind):
    folder, file = copy_of(whole, tmp_path, kind)
    raw = file.read_bytes()
    _, before = page_of(folder)
    for how, damage in DAMAGE.items():
        damaged = damage(raw)
        if damaged == raw:
            continue
        file.write_bytes(damaged)
        page, numbers = page_of(folder)
        if how == "cut at a line's end" and kind == "ppl" and damaged == b"":
            how = "empty"
        assert "Files left out" in page and named(page, file), how
        assert numbers, how
    file.unlink()
    file.mkdir()
    page, _ = page_of(folder)
    assert named(page, file)
    file.rmdir()
    os.mkfifo(file)
    page, _ = page_of(folder)
    assert named(page, file)
    file.unlink()
    file.write_bytes(codecs.BOM_UTF8 + raw.replace(b"\n", b"\r\n"))  # as an editor may save it
    page, numbers = page_of(folder)
    assert "Files left out" not in page and numbers == before


@pytest.mark.parametrize("kind", ["needle", "choice"])
def test_answers_that_are_not_those_of_the_run_are_named(whole, tmp_path, kind):
    folder = shutil.copytree(whole, tmp_path / "in")
    (file,) = folder.glob(KINDS[kind])
    lines = file.read_text().splitlines()
    other = json.dumps({**json.loads(lines[0]), "prompt_hash": "0" * 64})
    doc = json.dumps({**json.loads(lines[0]), "doc": {"question": "another"}})
    swapped = [lines[1], lines[0], *lines[2:]]
    for wrong in (lines[:-1], lines[1:], [*lines, lines[0]], swapped, [other, *lines[1:]], [doc, *lines[1:]]):
        file.write_text("\n".join(wrong) + "\n")
        assert named(page_of(folder)[0], file)
    file.unlink()
    assert named(page_of(folder)[0], file)


def test_a_copied_results_file_counts_once_and_is_named(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "in")
    (file,) = folder.glob(KINDS["results"])
    before = page_of(folder)[1]
    copy = Path(shutil.copy(file, file.with_name(f"{file.stem} (copy).json")))
    page, numbers = page_of(folder)
    assert named(page, file) and named(page, copy) and "run more than once" in page
    assert len(numbers) == len(before)


def test_a_point_may_not_lead_out_of_its_folder(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "in")
    (file,) = folder.glob(KINDS["point"])
    record = json.loads(file.read_text())
    (loose,) = folder.glob(KINDS["results"])
    file.write_text(json.dumps({**record, "results_file": f"../../../{loose.relative_to(folder)}"}))
    page, _ = page_of(folder)
    assert named(page, file) and "leads out" in page


def test_a_points_results_are_of_its_configuration(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "in")
    (file,) = folder.glob(KINDS["point"])
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "model_args": {**record["model_args"], "max_length": 7}}))
    assert "another configuration" in page_of(folder)[0]


def test_nothing_that_can_be_read_names_every_file(whole, tmp_path):
    (tmp_path / "results_a.json").write_text("{")
    (tmp_path / "results_b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as error:
        load.read(tmp_path)
    assert "results_a.json" in str(error.value) and "results_b.json" in str(error.value)


def script(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_script_names_damaged_files_on_stderr_and_ends_well(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "in")
    (file,) = folder.glob(KINDS["needle"])
    file.write_bytes(file.read_bytes()[:100])
    done = script(folder)
    assert done.returncode == 0, done.stderr
    assert str(file) in done.stderr and "Traceback" not in done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["damaged"] and str(file) in said["damaged"][0]
    page = (folder / "report" / "report.html").read_text()
    assert named(page, file) and page.rstrip().endswith("</html>")


def test_the_script_fails_in_one_line_where_it_cannot_read_or_write(whole, tmp_path):
    (tmp_path / "results_a.json").write_text("{")
    (tmp_path / "out").write_text("a file")
    for arguments in ((tmp_path,), (whole, "--output_path", tmp_path / "out")):
        done = script(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.strip().startswith("report stopped: ")
