"""Rows say by what they differ, and a method is compared with the full cache that was run as it was."""

from __future__ import annotations

import itertools

import pytest
from results import FULL, mean_task, plan, point, run, snapkv

from kv_lm_eval.reporting import load, rows

ONES, HALF = [1.0] * 20, [1.0, 0.0] * 10
TEMPLATE = {"chat_template": "{{ messages }}"}


def report_of(folder):
    return rows.report(*load.read(folder))


def labels(report):
    return [row.label for row in report.rows]


def comparison(report, label, task):
    row = next(row for row in report.rows if row.label == label)
    return next(cell.comparison for column, cell in row.cells.items() if column.task == task)


# Each changes what is recorded of one run and nothing else.
WAYS = {
    "chat_template": {"top": TEMPLATE},
    "system_instruction": {"top": {"system_instruction": "Be brief."}},
    "num_fewshot": {"top": {"n-shot": {"one": 5}}},
    "task_version": {"top": {"versions": {"one": 2.0}}},
    "gen_kwargs": {"gen_kwargs": {"temperature": 1.0}},
    "lengths": {"metadata": {"lengths": [256]}},
    "dtype": {"model_dtype": "torch.bfloat16"},
    "seed": {"random_seed": 1, "numpy_seed": 1, "torch_seed": 1, "fewshot_seed": 1},
    "model_sha": {"model_sha": "abc"},
    "an_argument": {"model_args": {"pretrained": "models/toy", "method": "full", "an_argument": 3}},
    "limit": {"limit": 20.0},
}


@pytest.mark.parametrize("name", WAYS)
def test_two_runs_that_differ_in_one_thing_are_told_apart_by_it(tmp_path, name):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES)})
    run(tmp_path / "b", FULL, {"one": mean_task(HALF)}, date=2, **WAYS[name])
    report = report_of(tmp_path)
    assert len(report.rows) == 2
    for label in labels(report):
        assert "#" not in label
    assert any(f" {name}=" in label for label in labels(report))
    assert not any("more than once" in note for note in report.notes)


@pytest.mark.parametrize("one, two", itertools.combinations(WAYS, 2))
def test_three_runs_are_told_apart_whatever_they_differ_in(tmp_path, one, two):
    for i, ways in enumerate(({}, WAYS[one], WAYS[two])):
        run(tmp_path / str(i), FULL, {"one": mean_task(ONES)}, date=i + 1, **ways)
    found = labels(report_of(tmp_path))
    assert len(set(found)) == 3 and not any("#" in label for label in found)


@pytest.mark.parametrize("name", sorted(set(WAYS) - {"an_argument"}))
def test_what_goes_with_a_task_makes_no_row(tmp_path, name):
    """As in a sweep with one task under a chat template: it is so for every method."""
    ways = {k: {n.replace("one", "two"): v for n, v in w.items()} if k == "top" else w for k, w in WAYS[name].items()}
    if "top" in ways:
        ways["top"] = {k: {"two": v["one"]} if isinstance(v, dict) else v for k, v in ways["top"].items()}
    for i, compression in enumerate((FULL, snapkv())):
        values = HALF if i else ONES
        run(tmp_path / f"a{i}", compression, {"one": mean_task(values)}, date=2 * i + 1)
        run(tmp_path / f"b{i}", compression, {"two": mean_task(values)}, date=2 * i + 2, **ways)
    report = report_of(tmp_path)
    assert labels(report) == ["full", "snapkv max_capacity_prompt=64"]
    for task in ("one", "two"):
        assert comparison(report, "snapkv max_capacity_prompt=64", task).difference == -0.5


def test_a_method_is_compared_with_the_full_cache_of_its_own_conditions(tmp_path):
    date = itertools.count(1)
    for i, compression in enumerate((FULL, snapkv())):
        for top, shift in (({}, 0.0), (TEMPLATE, 0.25)):
            values = [v - shift - i / 2 for v in ONES]
            tasks = {"one": mean_task(values, prompt="templated {}" if top else "prompt {}")}
            run(tmp_path / f"{i}{bool(top)}", compression, tasks, date=next(date), top=top)
    run(tmp_path / "two", FULL, {"two": mean_task(ONES)}, date=next(date), top=TEMPLATE)  # a task that only it has
    report = report_of(tmp_path)
    assert labels(report) == [
        "full",
        "full chat_template=yes",
        "snapkv max_capacity_prompt=64",
        "snapkv max_capacity_prompt=64 chat_template=yes",
    ]
    for label in labels(report)[2:]:
        assert comparison(report, label, "one").difference == -0.5 and comparison(report, label, "one").documents == 20
    assert not report.notes


def test_other_prompts_are_not_compared_and_other_conditions_are_said(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES), "two": mean_task(ONES)}, model_dtype="torch.float32")
    tasks = {"one": mean_task(HALF, prompt="templated {}"), "two": mean_task(HALF)}
    run(tmp_path / "b", snapkv(), tasks, date=2, model_dtype="torch.bfloat16")
    report = report_of(tmp_path)
    label = "snapkv max_capacity_prompt=64"
    assert comparison(report, label, "one").difference is None
    assert "other prompts" in comparison(report, label, "one").reason
    assert comparison(report, label, "two").difference == -0.5
    assert any("dtype=bfloat16 against float32" in note for note in report.notes)


def test_another_version_of_the_task_is_not_compared(tmp_path):
    run(tmp_path / "a", FULL, {"one": mean_task(ONES)})
    run(tmp_path / "b", snapkv(), {"one": mean_task(HALF)}, date=2, top={"versions": {"one": 2.0}})
    found = comparison(report_of(tmp_path), "snapkv max_capacity_prompt=64", "one")
    assert found.difference is None and "version 2.0 of the task against 1.0" in found.reason


def test_two_templates_are_told_apart(tmp_path):
    for i, template in enumerate((None, "{{ messages }}", "{{ messages }} ")):
        run(tmp_path / str(i), FULL, {"one": mean_task(ONES)}, date=i + 1, top={"chat_template": template})
    found = labels(report_of(tmp_path))
    assert len(set(found)) == 3 and "full" in found and all("#" not in label for label in found)


def test_points_of_one_name_are_told_apart_and_compared(tmp_path):
    """A sweep names its points by method and settings; two runs of tasks share the names."""
    points, date = [], itertools.count(1)
    for i, compression in enumerate((FULL, snapkv())):
        for template in (None, True):
            folder = tmp_path / "points" / f"p{i}{bool(template)}"
            prompt = "templated {}" if template else "prompt {}"
            tasks = {"one": mean_task([v - i / 2 for v in ONES], prompt=prompt)}
            top = TEMPLATE if template else {}
            args = {"pretrained": "models/toy", "method": compression["method"]}
            file = run(folder / "toy", compression, tasks, date=next(date), top=top, model_args=args)
            name = str(file.relative_to(folder))
            points.append(
                point(folder, compression["method"], "done", compression, ["one"], name, apply_chat_template=template)
            )
    plan(tmp_path, points)
    report = report_of(tmp_path)
    assert labels(report) == ["full", "full chat_template=yes", "snapkv", "snapkv chat_template=yes"]
    for label in labels(report)[2:]:
        assert comparison(report, label, "one").difference == -0.5
    assert not report.notes and not report.damaged


def test_a_planned_point_stands_in_the_row_of_its_method(tmp_path):
    folder = tmp_path / "points" / "p0"
    args = {"pretrained": "models/toy", "method": "snapkv"}
    file = run(folder / "toy", snapkv(), {"one": mean_task(ONES)}, model_args=args)
    done = point(folder, "snapkv", "done", snapkv(), ["one"], str(file.relative_to(folder)))
    plan(tmp_path, [done, {**done, "id": "p1", "tasks": ["two"]}])
    (row,) = report_of(tmp_path).rows
    assert [cell.state for cell in row.cells.values()] == ["scored", "planned"]
