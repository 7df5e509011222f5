"""What a report says of runs with fidelity=True: the table, its marks, the pictures, and files not to be believed."""

from __future__ import annotations

import math

import pytest
from results import FULL, mean_task, run, snapkv
from test_pictures import cut_off, on_another

from kv_lm_eval.reporting import build, fidelity, load, plots, rows

FLOOR = {"chunking": 1e-12, "bfloat16": 1e-4}


def numbers(kl: float, low: float | None = None, high: float | None = None, **more):
    along = {"tokens": 400, "kl": kl, "kl_se": 0.01, "kl_low": low, "kl_high": high, "kl_p50": kl / 2, "kl_p99": 3 * kl}
    along |= {"kl_max": 9 * kl, "same_top": 0.9, "same_top_se": 0.01, "delta_p_rms": 0.05, "delta_p_rms_se": 0.002}
    along |= {"ppl_ratio": 1.05, "ppl_ratio_se": 0.01}
    curve = [
        {"from": 2**k, "to": 2 ** (k + 1) - 1, "tokens": 9, "mean": kl * k, "low": None, "high": None} for k in range(5)
    ]
    found = {"kind": "loglikelihood_rolling", "requests": 2, "noise_floor": FLOOR, "along_base": along}
    return {**found, "by_position": curve, "by_distance": curve, **more}


def folder_of(tmp_path, found):
    """Runs of snapkv with budgets 64, 128, ... by their fidelity, None for a run without; the full cache first."""
    given = [(FULL, numbers(0.0, 0.0, 0.0)), *((snapkv(64 * 2**i), one) for i, one in enumerate(found))]
    for i, (compression, one) in enumerate(given):
        top = {} if one is None else {"fidelity": {"a": one}}
        run(tmp_path / str(i), compression, {"a": mean_task([1.0, 0.5])}, date=i + 1, top=top)
    return tmp_path


def report_of(folder):
    return rows.report(*load.read(folder))


def test_each_run_has_a_line_with_its_mark(tmp_path):
    flips = {"acc,none": {"documents": 9, "right_to_wrong": 3, "wrong_to_right": 1, "p": 0.625}}
    answers = {"identical": 0.75, "tokens_mean": 9.25, "base_tokens_mean": 8.0}
    evidence = {
        "kept": {"mean": None, "low": None, "high": None, "tokens": 0},
        "evicted": {"mean": 0.5, "low": 0.25, "high": 0.75, "tokens": 30, "facts": 6, "kept_share": 0.25},
    }
    found = [
        numbers(0.25, 0.2, 0.3, answers=answers, flips=flips, by_evidence=evidence),
        numbers(1.5e-4),
        numbers(1.5e-12),
        numbers(math.inf),
        None,
    ]
    table = fidelity.table(report_of(folder_of(tmp_path, found)))
    assert [head for head, _ in table.head][:4] == ["method", "task", "KV", "KL"]
    kl = [row[3].text for row in table.rows]
    assert kl == ["0 ≈ (0 to 0)", "0.25 (0.2 to 0.3)", "0.00015 ~", "2e-12 ≈", "∞"]
    assert [value.text for value in table.rows[1][-5:-1]] == ["-", "0.5", "75.0", "9.2 of 8.0"]
    assert table.rows[1][-4].title == "30 tokens, 25 % of their pairs kept, 0.25 to 0.75"
    assert [row[-1].text for row in table.rows][:3] == ["-", "-3 +1 (p 0.62)", "-"]
    assert table.rows[1][2].number == pytest.approx((1024 * 100 * 0.25 + 64) / 1024)
    assert "1e-12" in table.notes[0] and "0.0001" in table.notes[1]


def test_without_such_runs_there_is_nothing(tmp_path):
    report = report_of(folder_of(tmp_path, []) / "0")
    for row in report.rows:
        row.first.results.pop("fidelity")
    assert fidelity.table(report) is None and plots.fidelity.draw(report) == []


def test_the_pictures_show_what_is_there_and_no_text_is_cut_off(tmp_path):
    report = report_of(folder_of(tmp_path, [numbers(0.25, 0.2, 0.3), numbers(1e-3), numbers(math.inf)]))
    against, distance = plots.fidelity.draw(report)
    assert (against.name, distance.name) == ("kl_against_bytes", "kl_by_distance")
    for picture in (against, distance):
        assert not cut_off(picture.figure) and not on_another(picture.figure)
        (axis,) = picture.figure.axes
        assert axis.get_ylim()[0] < 1e-4 and axis.get_ylim()[0] > 1e-7  # bfloat16's floor is shown, rounding's is not
    assert plots.fidelity._front([(3, 1.0), (1, 5.0), (2, 6.0), (4, 1.0)]) == [(1, 5.0), (3, 1.0)]


def test_the_page_has_all_of_it_and_damaged_numbers_are_left_out(tmp_path):
    folder = folder_of(tmp_path / "runs", [numbers(0.25), {"along_base": "much", "noise_floor": None, "requests": 1}])
    written = build.write(folder, tmp_path / "out")
    page = written.page.read_text(encoding="utf-8")
    assert "Fidelity to the full cache" in page and "KL against bytes" in page
    assert (tmp_path / "out" / "tables" / "fidelity.csv").is_file()
    (damaged,) = written.report.damaged
    assert "fidelity.a.along_base" in damaged


def test_many_methods_leave_the_axes_their_room(tmp_path):
    report = report_of(folder_of(tmp_path, [numbers(0.25 / i, 0.1 / i, 0.3 / i) for i in range(1, 19)]))
    for picture in plots.fidelity.draw(report):
        picture.figure.draw_without_rendering()
        (axis,) = picture.figure.axes
        assert axis.get_window_extent().height / picture.figure.dpi > 2.0
        assert not cut_off(picture.figure) and not on_another(picture.figure)
