"""Which runs share a row, what they are called, and what they are compared with."""

from __future__ import annotations

import json
import math
import re

import pytest
from results import FULL, efficiency, mean_task, perplexity_task, plan, planned, point, run, snapkv

from kv_lm_eval.errors import UserError
from kv_lm_eval.reporting import load, rows, tables
from kv_lm_eval.reporting.table import as_csv, as_markdown

ONES = [1.0] * 20
HALF = [1.0, 0.0] * 10


def report_of(folder, metrics=()):
    return rows.report(*load.read(folder), metrics)


def cell(report, label, task):
    row = next(r for r in report.rows if r.label == label)
    return next(c for column, c in row.cells.items() if column.task == task)


def test_methods_are_rows_and_tasks_are_columns_whatever_run_they_come_from(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES), "two": mean_task(ONES)})
    run(tmp_path / "b", snapkv(), {"one": mean_task(HALF)}, date=2)
    run(tmp_path / "c" / "deep", snapkv(), {"two": mean_task(ONES)}, date=3)
    report = report_of(tmp_path)
    assert [r.label for r in report.rows] == ["full", "snapkv max_capacity_prompt=64"]
    assert [c.task for c in report.columns] == ["one", "two"]
    assert cell(report, "full", "one").is_base
    one, two = (cell(report, "snapkv max_capacity_prompt=64", t).comparison for t in ("one", "two"))
    assert one.difference == -0.5 and one.verdict == "outside noise" and one.documents == 20
    assert two.verdict == "identical"
    assert not report.notes


def test_labels_name_what_differs_and_rows_of_a_method_stand_by_budget(tmp_path):
    task = {"one": mean_task(ONES)}
    for i, (budget, window) in enumerate([(256, 16), (64, 16), (64, 32)]):
        run(tmp_path / str(i), snapkv(budget, window_size=window), task, date=i + 1)
    run(tmp_path / "full", None, task, date=9)
    run(tmp_path / "knorm", {"method": "knorm", "keep_ratio": 0.5}, task, date=10)
    assert [r.label for r in report_of(tmp_path).rows] == [
        "full (hf)",
        "snapkv max_capacity_prompt=64 window_size=16",
        "snapkv max_capacity_prompt=64 window_size=32",
        "snapkv max_capacity_prompt=256 window_size=16",
        "knorm keep_ratio=0.5",
    ]


def test_the_latest_of_repeated_runs_is_shown_and_said(tmp_path):
    run(tmp_path / "old", FULL, {"one": mean_task(HALF)}, date=1)
    run(tmp_path / "new", FULL, {"one": mean_task(ONES)}, date=2)
    report = report_of(tmp_path)
    assert len(report.rows) == 1 and cell(report, "full", "one").value == 1.0
    assert "more than once" in report.notes[0]


def test_other_documents_are_another_row_and_compared_on_the_common_ones(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES)})
    run(tmp_path / "b", snapkv(), {"one": mean_task([0.0] * 8, docs=range(4, 12))}, date=2, limit=8)
    run(tmp_path / "c", snapkv(), {"one": mean_task(ONES)}, date=3)
    report = report_of(tmp_path)
    assert {r.label for r in report.rows} == {
        "full",
        "snapkv max_capacity_prompt=64 limit=8",
        "snapkv max_capacity_prompt=64",
    }
    few = next(r for r in report.rows if r.variant.get("limit") == 8)
    comparison = next(iter(few.cells.values())).comparison
    assert (comparison.documents, comparison.left_out, comparison.difference) == (8, 12, -1.0)
    assert any("8 documents they have in common (12 documents left out)" in note for note in report.notes)


def test_no_common_document_is_refused(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES)})
    run(tmp_path / "b", snapkv(), {"one": mean_task(ONES, docs=range(100, 120))}, date=2)
    report = report_of(tmp_path)
    comparison = cell(report, "snapkv max_capacity_prompt=64", "one").comparison
    assert comparison.difference is None and "no document in common" in comparison.reason
    assert tables.differences(report).rows[0][1].text == "-"


def test_without_answers_there_is_a_difference_and_no_interval(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES)}, log_samples=False)
    run(tmp_path / "b", snapkv(), {"one": mean_task(HALF)}, date=2, log_samples=False)
    report = report_of(tmp_path)
    comparison = cell(report, "snapkv max_capacity_prompt=64", "one").comparison
    assert comparison.difference == -0.5 and comparison.low is None and comparison.verdict == "unknown"
    assert any("--log_samples" in note for note in report.notes)


def test_less_is_better_for_perplexity(tmp_path):
    base = [(-30.0 - i, 10) for i in range(12)]
    worse = [(ll - 5, n) for ll, n in base]
    run(tmp_path / "a", FULL, {"ppl": perplexity_task(base)})
    run(tmp_path / "b", snapkv(), {"ppl": perplexity_task(worse)}, date=2)
    report = report_of(tmp_path)
    column = report.columns[0]
    assert column.higher_is_better is False and column.arrow == "↓"
    value = cell(report, "snapkv max_capacity_prompt=64", "ppl")
    expected = math.exp(-sum(p[0] for p in worse) / 120) - math.exp(-sum(p[0] for p in base) / 120)
    assert value.comparison.difference == pytest.approx(expected) and value.comparison.low > 0
    assert tables.tone(value, column) == "worse"


def test_one_long_text_is_compared_by_blocks_of_its_tokens(tmp_path):
    tokens = 512 * 9 + 100
    nll = [None] * 10 + [2.0 + (i % 7) / 10 for i in range(tokens - 10)]
    for i, shift in enumerate((0.0, 0.3)):
        mine = [None if v is None else v + shift * (1 + (j // 512) % 2) for j, v in enumerate(nll)]
        pair = (-math.fsum(v for v in mine if v is not None), tokens - 10)
        task = {**perplexity_task([pair]), "metric": "perplexity", "extra": [{"per_token": {"nll": mine}}]}
        run(tmp_path / str(i), FULL if i == 0 else snapkv(), {"ppl": task}, date=i + 1)
    comparison = cell(report_of(tmp_path), "snapkv max_capacity_prompt=64", "ppl").comparison
    assert (comparison.documents, comparison.changed, comparison.unit) == (18, 18, "blocks of 256 tokens")
    assert comparison.verdict == "outside noise" and 0 < comparison.low < comparison.difference < comparison.high


def test_one_document_without_its_tokens_has_no_interval(tmp_path):
    run(tmp_path / "a", FULL, {"ppl": perplexity_task([(-300.0, 100)])})
    run(tmp_path / "b", snapkv(), {"ppl": perplexity_task([(-310.0, 100)])}, date=2)
    report = report_of(tmp_path)
    assert cell(report, "snapkv max_capacity_prompt=64", "ppl").comparison.verdict == "too few documents"
    assert re.fullmatch(r"\+2\.\d+ \?", tables.differences(report).rows[0][1].text)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_group_is_averaged_as_lm_eval_did(tmp_path, weighted):
    ours = {"one": mean_task(HALF), "two": mean_task([1.0] * 60)}
    base = {"one": mean_task(ONES), "two": mean_task([1.0] * 60)}

    def group(one, two):
        return {
            "both": {
                "tasks": ["one", "two"],
                "metric": "acc",
                "value": (20 * one + 60 * two) / 80 if weighted else (one + two) / 2,
            }
        }

    run(tmp_path / "a", FULL, base, groups=group(1.0, 1.0))
    run(tmp_path / "b", snapkv(), ours, date=2, groups=group(0.5, 1.0))
    report = report_of(tmp_path)
    assert [c.task for c in report.columns] == ["one", "two", "both"]
    comparison = cell(report, "snapkv max_capacity_prompt=64", "both").comparison
    assert comparison.difference == pytest.approx(-0.125 if weighted else -0.25)
    assert comparison.documents == 80 and comparison.verdict == "outside noise"


def test_a_group_averaged_in_another_way_has_no_interval(tmp_path):
    tasks = {"one": mean_task(HALF), "two": mean_task(ONES)}
    odd = {"both": {"tasks": ["one", "two"], "metric": "acc", "value": 0.123}}
    run(tmp_path / "a", FULL, tasks, groups=odd)
    run(tmp_path / "b", snapkv(), tasks, date=2, groups=odd)
    comparison = cell(report_of(tmp_path), "snapkv max_capacity_prompt=64", "both").comparison
    assert comparison.low is None and "averages" in comparison.reason


def test_what_was_not_compressed_is_marked(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES)})
    run(tmp_path / "b", snapkv(), {"one": mean_task(ONES, compressed=0.0)}, date=2)
    report = report_of(tmp_path)
    assert cell(report, "snapkv max_capacity_prompt=64", "one").untouched
    assert "1.000°" in tables.scores(report).rows[1][3].text
    assert "compressed no request" in report.notes[0]


@pytest.fixture
def sweep(tmp_path):
    """Two points done, one of each other state, one not started."""
    task = {"one": mean_task(ONES)}
    points = []
    for i, (status, settings) in enumerate(
        [
            ("done", FULL),
            ("done", snapkv(64)),
            ("out_of_memory", snapkv(128)),
            ("failed", snapkv(256)),
            ("running", snapkv(512)),
        ]
    ):
        folder = tmp_path / "points" / f"p{i}"
        file = run(folder / "toy", settings, task, date=i + 1) if status == "done" else None
        name = str(file.relative_to(folder)) if file else None
        points.append(point(folder, f"point {i}", status, settings, ["one", "two"], name))
    plan(tmp_path, [*points, planned("p5", "point 5", snapkv(1024), ["one", "two"])])
    return tmp_path


def test_a_sweep_shows_its_names_and_what_became_of_each_point(sweep):
    report = report_of(sweep)
    assert [r.label for r in report.rows] == [f"point {i}" for i in range(6)]
    states = ["1.000 ± 0.010", "1.000 ± 0.010", "OOM", "failed", "running", "planned"]
    assert [v[3].text for v in tables.scores(report).rows] == states
    assert [v[4].text for v in tables.scores(report).rows] == ["-", "-", *states[2:]]  # a task that no point has yet
    assert any("point 2: OOM. OutOfMemoryError: too much" in note for note in report.notes)


def test_a_sweep_that_is_not_done_says_so_everywhere(sweep):
    report = report_of(sweep)
    counts = "2 done, 1 running (or stopped on the way), 1 failed, 1 out of memory, 1 not started"
    told = f"Sweep sweep: 6 points planned: {counts}."
    assert report.notes[0].startswith(told)
    for table in (tables.progress(report), tables.scores(report), tables.differences(report), tables.speed(report)):
        assert told in as_markdown(table), table.name
    for text in (
        as_csv(table)
        for table in (
            tables.scores(report),
            tables.differences(report),
            tables.speed(report),
            tables.every_number(report),
        )
    ):
        assert all(
            any(f"point {i}" in line and state in line for line in text.splitlines())
            for i, state in ((2, "OOM"), (3, "failed"), (4, "running"), (5, "planned"))
        )
    assert as_csv(tables.progress(report)).splitlines() == [
        "sweep,planned,done,running,failed,OOM,damaged,not started",
        "sweep,6,2,1,1,1,0,1",
    ]


def test_a_sweep_that_is_done_warns_of_nothing(tmp_path):
    folder = tmp_path / "points" / "p0"
    file = run(folder / "toy", FULL, {"one": mean_task(ONES)})
    plan(tmp_path, [point(folder, "full", "done", FULL, ["one"], str(file.relative_to(folder)))])
    report = report_of(tmp_path)
    assert not report.notes and not report.damaged and report.said.sweeps[0].is_done


def test_a_sweep_that_has_only_begun_is_a_report_too(tmp_path):
    plan(tmp_path, [planned(f"p{i}", f"point {i}", snapkv(2**i), ["one"]) for i in range(3)])
    report = report_of(tmp_path)
    assert [v[3].text for v in tables.scores(report).rows] == ["planned"] * 3 and "3 not started" in report.notes[0]


def test_missing_cells_are_a_dash_and_times_not_measured_are_na(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES), "two": mean_task(ONES)})
    ttft = {"median": 0.25, "p10": 0.2, "p90": 0.3, "n": 20}
    stats = {"efficiency": efficiency(ttft_s=ttft)}
    run(tmp_path / "b", snapkv(), {"one": mean_task(ONES)}, date=2, stats=stats)
    report = report_of(tmp_path)
    assert tables.scores(report).rows[1][4].text == "-"
    speed = tables.speed(report).rows
    assert [name for name, _ in tables.speed(report).head[1:3]] == ["TTFT", "KV after prefill"]
    assert "left out: TPOT, throughput, peak of prefill, peak of decode" in tables.speed(report).notes[0]
    assert [v[1].text for v in speed] == ["N/A", "250.00 (200.00 to 300.00)"]
    everything = "".join(
        as_markdown(t) for t in (tables.scores(report), tables.differences(report), tables.speed(report))
    )
    assert "nan" not in everything.lower()


def test_lengths_of_answers_stand_beside_the_full_caches(tmp_path):
    """Means over the tasks that both generated as many answers of."""
    for name, compression, lengths in (
        ("a", FULL, (100.0, 200.0)),
        ("b", snapkv(), (150.0, None)),
        ("c", snapkv(9), ()),
    ):
        tasks = {"one": mean_task(ONES), "two": mean_task(ONES)} if lengths else {"two": mean_task(ONES[:5])}
        file = run(tmp_path / name, compression, tasks, date=1 + len(name))
        results = json.loads(file.read_text(encoding="utf-8"))
        by_task = results["config"]["kv_stats"]["by_task"]
        for task, length in zip(by_task, lengths or (999.0,), strict=True):
            by_task[task] |= {} if length is None else {"answer_tokens_mean": length}
        results["config"]["kv_stats"]["answer_tokens_mean"] = 1.0
        file.write_text(json.dumps(results), encoding="utf-8")
    table = tables.speed(report_of(tmp_path))
    assert table.head[-3:] == [("answer", "tokens"), ("answer", "of full"), ("run", "s")]
    assert [row[-2].text for row in table.rows] == ["N/A", "N/A", "x 1.50"]  # by budget


def test_documents_without_a_score_are_counted_and_not_zero(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES)})
    values = [None, None, *ONES[2:]]
    task = {"metric": "acc", "filter": "none", "values": values, "value": 1.0, "answers": ["x"] * 20}
    run(tmp_path / "b", snapkv(), {"one": task}, date=2)
    report = report_of(tmp_path)
    found = cell(report, "snapkv max_capacity_prompt=64", "one")
    assert found.unscored == 2 and found.comparison.documents == 18 and found.comparison.left_out == 2
    assert any("2 documents have no acc" in note for note in report.notes)


def test_other_prompts_and_other_task_versions_are_said(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES)})
    file = run(tmp_path / "b", snapkv(), {"one": mean_task(ONES, prompt="another prompt {}")}, date=2)
    results = json.loads(file.read_text())
    results["versions"]["one"] = 2.0
    file.write_text(json.dumps(results))
    said = " ".join(report_of(tmp_path).notes)
    assert "one: 20 documents were asked with other prompts" in said and "several versions" in said


def test_two_models_have_their_own_full_cache(tmp_path):
    for i, (name, value) in enumerate([("m1", ONES), ("m2", HALF)]):
        for j, compression in enumerate((FULL, snapkv())):
            file = run(tmp_path / f"{name}{j}", compression, {"one": mean_task(value)}, date=1 + 2 * i + j)
            file.write_text(file.read_text().replace("models/toy", name))
    report = report_of(tmp_path)
    assert [r.label for r in report.rows][:2] == ["m1: full", "m2: full"]
    assert all(next(iter(r.cells.values())).comparison.verdict == "identical" for r in report.rows[2:])


def test_metrics_can_be_chosen_and_a_wrong_name_lists_the_right_ones(tmp_path):
    file = run(tmp_path / "a", FULL, {"one": mean_task(ONES)})
    results = json.loads(file.read_text())
    results["results"]["one"] |= {"f1,none": 0.25, "f1_stderr,none": "N/A"}
    results["higher_is_better"]["one"]["f1"] = True
    file.write_text(json.dumps(results))
    assert [c.metric for c in report_of(tmp_path).columns] == ["acc"]
    assert [c.metric for c in report_of(tmp_path, ["f1"]).columns] == ["f1"]
    with pytest.raises(UserError, match="acc, f1"):
        report_of(tmp_path, ["f2"])


def test_a_folder_without_results_says_how_to_get_some(tmp_path):
    (tmp_path / "results_odd.json").write_text("not json")
    with pytest.raises(UserError, match="--output_path"):
        load.read(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        load.read(tmp_path / "nowhere")


def test_what_a_random_choice_owes_to_its_seed_is_said(tmp_path):
    run(tmp_path / "full", FULL, {"t": mean_task([1.0] * 8)})
    drawn = {"method": "random", "max_capacity_prompt": 64}
    for seed, right in enumerate((2, 6, 4)):
        task = mean_task([float(i < right) for i in range(8)])
        run(tmp_path / str(seed), {**drawn, "seed": seed}, {"t": task}, date=2 + seed)
    fixed = {"method": "l2_fixed", "cache_size": 64, "seed": 0}
    run(tmp_path / "low", {**fixed, "strategy": "keep_low"}, {"t": mean_task([1.0] * 8)}, date=6)
    run(tmp_path / "one", {**fixed, "strategy": "random"}, {"t": mean_task([1.0] * 8)}, date=7)
    notes = report_of(tmp_path).notes
    assert any("random, t: 3 seeds from 0.25 to 0.75, mean 0.5" in note for note in notes)
    (alone,) = (note for note in notes if "one seed" in note)
    assert "strategy=random" in alone
