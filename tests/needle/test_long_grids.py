"""Long grids: resumed where they stopped, the bar names the cell, what does not fit in memory is marked."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pytest
import torch

from kv_lm_eval import plugin, progress
from kv_lm_eval.errors import OUT_OF_MEMORY
from kv_lm_eval.requests import generation
from kv_lm_eval.tasks.needle import heatmap

plugin.install()
pytestmark = pytest.mark.filterwarnings("ignore")
GRID = {"lengths": [256, 512, 768], "depths": [0, 100], "samples_per_cell": 1}


@pytest.fixture(scope="module")
def whole() -> dict:
    """The grid without any trouble."""
    return run()


def run(batch_size: int = 2, cache: Path | None = None, **settings) -> dict:
    given = {"method": "snapkv", "max_capacity_prompt": 128, "window_size": 16, **settings}
    with plugin.only_our_tasks():
        return lm_eval.simple_evaluate(
            model="kvcompressed",
            model_args={"pretrained": "kv-tiny", "dtype": "float32", **given},
            tasks=["kv_needle_magic"],
            batch_size=batch_size,
            metadata=GRID,
            use_cache=str(cache) if cache else None,
            bootstrap_iters=0,
            device="cpu",
        )


@pytest.fixture
def asked(monkeypatch, whole) -> list[int]:
    """The prompt lengths of every forward batch; those in `asked.fail` run out of memory."""

    class Asked(list):
        fail, stop_at = (10**9, 10**9), 10**9  # rows, tokens from which on memory is out; batch that is interrupted

    log, original = Asked(), generation._generate

    def generate(run, prompts, contexts):
        log.append(tuple(len(prompt.ids) for prompt in prompts))
        if len(log) > log.stop_at:
            raise KeyboardInterrupt
        if len(prompts) >= log.fail[0] and max(log[-1]) >= log.fail[1]:
            raise torch.OutOfMemoryError("no memory")
        return original(run, prompts, contexts)

    monkeypatch.setattr(generation, "_generate", generate)
    return log


def scores(results: dict) -> list:
    return [c["scores"].get("contains") for c in results["results"]["kv_needle_magic"]["cells,none"]]


def answers(results: dict) -> list:
    return [s["resps"] for s in results["samples"]["kv_needle_magic"]]


def test_an_interrupted_grid_goes_on_where_it_stopped(tmp_path, asked, whole):
    asked.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(cache=tmp_path / "cache")
    asked.clear()
    asked.stop_at = 10**9
    resumed = run(cache=tmp_path / "cache")
    assert len(asked) == 1  # of three batches two had been answered
    assert answers(resumed) == answers(whole)
    assert scores(resumed) == scores(whole)


def test_a_batch_that_is_too_large_is_answered_row_by_row(asked, whole):
    asked.fail = (2, 0)
    assert answers(run()) == answers(whole)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_cell_out_of_memory_is_marked_and_the_rest_goes_on(asked, batch_size, caplog, tmp_path, whole):
    asked.fail = (1, 600)
    results = run(batch_size)
    assert scores(results) == [*scores(whole)[:4], None, None]
    assert answers(results)[-1] == [[OUT_OF_MEMORY]]
    assert "out of memory: 768 tokens, depth 100 %" in caplog.text
    file = tmp_path / "results_1.json"
    file.write_text(json.dumps({k: results[k] for k in ("results", "config")}, default=str))
    assert [c["state"] for c in heatmap.read([file])[0].cells[-2:]] == ["OOM", "OOM"]


def test_an_answer_out_of_memory_is_tried_again_by_the_next_run(asked, tmp_path):
    asked.fail = (1, 600)
    run(cache=tmp_path / "cache")
    asked.clear()
    asked.fail = (10**9, 10**9)
    again = run(cache=tmp_path / "cache")
    assert [min(batch) > 600 for batch in asked] == [True]
    assert None not in scores(again)


def test_other_tasks_still_stop_when_memory_is_out(asked, monkeypatch):
    asked.fail = (1, 0)
    from model.test_requests import load, request

    lm = load("kvcompressed", method="full")
    with pytest.raises(torch.OutOfMemoryError):
        lm.generate_until([request("generate_until", "A text.", {"until": ["."], "max_gen_toks": 4})])


def test_the_bar_names_the_cell(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)  # a log gets a line a minute
    run(batch_size=1)
    shown = capsys.readouterr().err
    assert "768 tokens, depth 0 %" in shown
    assert "6 of 6" in shown
