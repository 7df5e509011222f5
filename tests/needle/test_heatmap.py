"""Heat-maps compared as data; the picture is drawn once to see that it can be."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kv_lm_eval.tasks.needle import heatmap, report, scoring

LENGTHS, DEPTHS = (256, 512), (0.0, 50.0, 100.0)


def answer(length: int, depth: float | None, score: float, failed: str | None = None, removed: bool = False) -> dict:
    return {
        "context_length": length,
        "document_depth_percent": depth,
        "length_tokens": length - 48,
        "needle_removed": removed,
        "primary": "contains",
        "failed": failed,
        "scores": {} if failed else {"contains": score, "exact": 0.0},
    }


def results(folder: Path, name: str, settings: dict | None, answers: list[dict], task: str = "kv_needle_magic") -> Path:
    """A results file as lm-eval writes it, of the keys that are read."""
    cells = list(scoring.grid(answers))
    config = {"model": "kvcompressed" if settings else "hf", "model_args": {"pretrained": "org/tiny"}}
    if settings:
        config["kv_compression"] = settings
    file = folder / f"results_{name}.json"
    file.write_text(json.dumps({"results": {task: {"contains,none": 0.5, "cells,none": cells}}, "config": config}))
    return file


def window(length: int, depth: float) -> float:
    return float(length * (1 - depth / 100) < 200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    places = [(n, d) for n in LENGTHS for d in DEPTHS]
    streaming = {"method": "streaming_llm", "max_capacity_prompt": 208}
    results(tmp_path, "1", streaming, [answer(n, d, window(n, d)) for n, d in places])
    results(tmp_path, "2", {"method": "full"}, [answer(n, d, 1.0) for n, d in places])
    ratio = {"method": "knorm", "keep_ratio": 0.25}
    results(tmp_path, "3", ratio, [answer(n, d, 0.5, failed="OOM" if n == 512 else None) for n, d in places])
    return tmp_path


def test_panels_hold_the_grid_with_full_caches_first(folder):
    full, streaming, knorm = heatmap.read([folder])
    assert [p.label for p in (full, streaming, knorm)] == ["full cache", "streaming_llm, 208 pairs", "knorm, 25% kept"]
    assert (full.lengths, full.depths, full.model, full.metric) == ([256, 512], [0, 50, 100], "tiny", "contains")
    assert full.matrix() == [[1, 1]] * 3
    assert streaming.matrix() == [[0, 0], [1, 0], [1, 1]]
    assert knorm.matrix() == [[0.5, None]] * 3  # a failure is no zero
    assert (full.mean, streaming.mean, knorm.mean) == (1, 0.5, 0.5)


def test_cells_within_the_budget_and_failed_ones_are_marked(folder):
    full, streaming, knorm = heatmap.read([folder])
    assert {c["state"] for c in full.cells} == {"scored"}
    assert [c["state"] for c in streaming.cells] == ["not compressed"] * 3 + ["scored"] * 3
    assert [c["state"] for c in knorm.cells] == ["scored"] * 3 + ["OOM"] * 3


def test_a_method_that_cuts_while_it_answers_needs_room_for_the_answer_too(tmp_path):
    settings = {"method": "h2o", "max_capacity_prompt": 208, "compress_every": 1}
    (panel,) = heatmap.read([results(tmp_path, "1", settings, [answer(256, 0, 1.0)])])
    assert panel.cells[0]["state"] == "scored"  # 208 tokens of prompt fit, 48 of the answer do not


def test_a_cell_that_partly_ran_out_of_memory_has_the_mean_of_the_rest(tmp_path):
    file = results(tmp_path, "1", None, [answer(256, 0, 1.0), answer(256, 0, 0, failed="OOM")])
    (panel,) = heatmap.read([file])
    assert (panel.cells[0]["score"], panel.cells[0]["samples"], panel.cells[0]["failed"]) == (1, 1, {"OOM": 1})


def test_the_stock_model_is_a_full_cache(tmp_path):
    (panel,) = heatmap.read([results(tmp_path, "1", None, [answer(256, 0, 1.0)])])
    assert panel.label == "full cache (hf)"


def test_the_floor_is_the_mean_without_the_needle(tmp_path):
    answers = [answer(256, 0, 1.0), answer(256, 0, 0.25, removed=True), answer(256, 0, 0.75, removed=True)]
    (panel,) = heatmap.read([results(tmp_path, "1", {"method": "full"}, answers)])
    assert (panel.floor, panel.mean) == (0.5, 1)


def test_samples_files_give_the_same_grid(folder):
    answers = [answer(n, d, window(n, d)) for n in LENGTHS for d in DEPTHS]
    samples = folder / "samples_kv_needle_magic_1.jsonl"
    samples.write_text("\n".join(json.dumps({"doc": {}, "cells": a}) for a in answers))
    from_samples, from_results = heatmap.read([samples])[0], heatmap.read([folder / "results_1.json"])[0]
    assert from_samples.cells == from_results.cells
    assert (from_samples.task, from_samples.label) == (from_results.task, from_results.label)


def test_another_score_can_be_asked_for_and_an_unknown_one_is_refused(folder):
    assert heatmap.read([folder], "exact")[0].mean == 0
    with pytest.raises(ValueError, match="no score 'rouge'; it has: contains, exact"):
        heatmap.read([folder], "rouge")


def test_settings_that_share_a_label_are_told_apart(folder):
    for name, size in (("5", 16), ("6", 32)):
        settings = {"method": "snapkv", "max_capacity_prompt": 64, "kernel_size": 7, "window_size": size}
        results(folder, name, settings, [answer(n, d, 1.0) for n in LENGTHS for d in DEPTHS])
    labels = [p.label for p in heatmap.read([folder])]
    assert labels[1] == "streaming_llm, 208 pairs"
    assert labels[3:] == ["snapkv, 64 pairs\nwindow_size=16", "snapkv, 64 pairs\nwindow_size=32"]


def test_files_without_a_grid_are_refused(tmp_path):
    (tmp_path / "results_1.json").write_text('{"results": {"gsm8k": {"acc,none": 1}}}')
    with pytest.raises(ValueError, match="no needle grid"):
        heatmap.read([tmp_path / "results_1.json"])
    assert report.write(tmp_path / "results_1.json") == ""


def test_csv_and_json_hold_every_cell(folder, tmp_path):
    panels = heatmap.read([folder])
    png, svg, table, document = heatmap.write(panels, tmp_path / "deep" / "map")
    with table.open() as rows:
        read = list(csv.DictReader(rows))
    assert len(read) == 18
    assert [r["score"] for r in read if r["label"].startswith("knorm")] == ["0.5"] * 3 + [""] * 3
    assert [p["scores"] for p in json.loads(document.read_text())] == [p.matrix() for p in panels]
    assert png.read_bytes()[:4] == b"\x89PNG" and "<svg" in svg.read_text()


@pytest.mark.parametrize("colours", heatmap.COLOURS)
def test_all_panels_are_drawn_on_one_scale_from_0_to_1(folder, colours):
    figure = heatmap.draw(heatmap.read([folder]), colours=colours)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert [image.get_clim() for image in images] == [(0, 1)] * 3
    assert len({image.get_cmap().name for image in images}) == 1
    assert [len(axis.patches) for axis in figure.axes[:3]] == [0, 3, 3]
    texts = {t.get_text() for t in figure.axes[2].texts}
    assert texts == {"0.50", "OOM"}


def test_many_panels_wrap_and_tasks_without_depth_have_one_row(tmp_path):
    for i in range(9):
        budget = {"method": "snapkv", "max_capacity_prompt": i}
        results(tmp_path, str(i), budget, [answer(n, None, 0.5) for n in range(1000, 9000, 1000)], "kv_needle_cwe")
    panels = heatmap.read([tmp_path])
    assert panels[0].matrix() == [[0.5] * 8]
    assert heatmap.as_text(panels[0]).splitlines()[1].split()[0] == "all"
    assert heatmap.draw(panels).get_size_inches()[0] <= 18.5


def test_unknown_colours_are_refused(folder):
    with pytest.raises(ValueError, match="not one of: classic, viridis"):
        heatmap.draw(heatmap.read([folder]), colours="jet")


def test_the_report_writes_beside_the_results_and_compares_what_was_asked_alike(folder):
    other = [answer(n, d, 0.0) for n in (256, 1024) for d in DEPTHS]
    results(folder, "4", {"method": "random", "max_capacity_prompt": 8}, other)
    said = report.write(folder / "results_1.json")
    assert "streaming_llm, 208 pairs: contains 0.50" in said and "nothing was compressed" in said
    assert "1.00*" in said and "3 methods side by side" in said
    for kind in ("png", "svg", "csv", "json"):
        assert (folder / f"kv_needle_magic_1.{kind}").is_file()
    compared = json.loads((folder / "kv_needle_magic_compared.json").read_text())
    assert [p["method"] for p in compared] == ["full", "streaming_llm", "knorm"]


def test_the_script_draws_a_folder_and_ends_in_json(folder):
    script = Path(__file__).parents[2] / "scripts" / "needle_heatmap.py"
    command = [sys.executable, str(script), str(folder), "--output", str(folder / "all"), "--colours", "viridis"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    said = json.loads(done.stdout.splitlines()[-1])["kv_needle_magic"]
    assert said["means"] == {"full cache": 1, "streaming_llm, 208 pairs": 0.5, "knorm, 25% kept": 0.5}
    assert all(Path(file).is_file() for file in said["files"])


def test_a_damaged_file_in_a_folder_is_left_out_and_said(folder):
    (folder / "results_9.json").write_text('{"results": {"kv_needle')
    script = Path(__file__).parents[2] / "scripts" / "needle_heatmap.py"
    command = [sys.executable, str(script), str(folder), "--output", str(folder / "all")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert "left out: " in done.stderr and str(folder / "results_9.json") in done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["kv_needle_magic"]["means"]) == 3
    with pytest.raises(ValueError, match="results_9.json"):
        heatmap.read([folder / "results_9.json"])
