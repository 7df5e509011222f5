"""A batch that runs out of memory is halved and goes on, down to single rows, and says so once."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from model.test_requests import choices, generations, load

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.requests.halving import Halving, largest_batch
from kv_lm_eval.requests.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")
SNAPKV = {"method": "snapkv", "max_capacity_prompt": 40, "window_size": 8}


def with_memory_for(lm, rows: int, monkeypatch) -> list[int]:
    """The batch sizes of all forwards; those of more than `rows` rows run out of memory."""
    asked, forward = [], lm.model.forward

    @functools.wraps(forward)  # generate() looks at its signature
    def limited(*args, **kwargs):
        cache = next((v for v in kwargs.values() if isinstance(v, CompressedCache)), None)
        rows_of = [fed.segment.rows for fed in cache._announced or ()] if cache is not None else []
        asked.append(sum(rows_of) or (args or (kwargs["input_ids"],))[0].shape[0])
        if asked[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", limited)
    return asked


@pytest.mark.parametrize("settings", [SNAPKV, {"method": "full"}, {"method": "no_cache"}], ids=lambda s: s["method"])
@pytest.mark.parametrize("rows", [1, 2])
def test_answers_are_those_of_a_machine_with_enough_memory(settings, rows, monkeypatch, caplog):
    asks = [("generate_until", generations()), ("loglikelihood", choices())]
    if settings["method"] == "no_cache":  # whose choices are lm-eval's own forwards
        asks = asks[:1]
    for kind, requests in asks:
        roomy, tight = (load("kvcompressed", batch_size=4, **settings) for _ in range(2))
        expected = getattr(roomy, kind)(requests, disable_tqdm=True)
        caplog.clear()
        asked = with_memory_for(tight, rows, monkeypatch)
        got = getattr(tight, kind)(requests, disable_tqdm=True)
        if kind == "generate_until":
            assert got == expected
        else:
            assert [s for s, _ in got] == pytest.approx([s for s, _ in expected], abs=2e-4)
        assert max(asked) > rows
        assert caplog.text.count("out of memory with") == 1
        assert tight.get_model_info()["kv_stats"]["requests"] == len({r.args[0] for r in requests})


def test_what_does_not_fit_alone_raises(monkeypatch):
    lm = load("kvcompressed", **SNAPKV)
    with_memory_for(lm, 0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        lm.generate_until(generations(), disable_tqdm=True)
    with pytest.raises(torch.OutOfMemoryError):
        lm.loglikelihood(choices(), disable_tqdm=True)


def test_batches_of_a_size_that_failed_are_not_tried_again_but_smaller_ones_are():
    tried = []

    def work(rows):
        tried.append(list(rows))
        if sum(rows) > 20:
            raise torch.OutOfMemoryError("no memory")
        return [2 * r for r in rows]

    halving = Halving(logging.getLogger("test"))
    done = [part for batch in ([9, 9, 8, 8], [9, 8, 8], [3, 3, 2]) for part in halving.run(batch, work, lambda r: r)]
    assert [r for rows, _ in done for r in rows] == [9, 9, 8, 8, 9, 8, 8, 3, 3, 2]
    assert all(result == [2 * r for r in rows] for rows, result in done)
    assert tried == [[9, 9, 8, 8], [9, 9], [8, 8], [9, 8, 8], [9, 8], [8], [3, 3, 2]]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def work(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(Halving(logging.getLogger("test")).run([1, 2], work, lambda r: r))


@pytest.mark.parametrize(("fits", "expected"), [(100, 64), (64, 64), (63, 32), (9, 8), (1, 1), (0, 1)])
def test_the_largest_batch_is_found_by_halving(fits, expected):
    def attempt(rows):
        if rows > fits:
            raise torch.OutOfMemoryError("no memory")

    assert largest_batch(attempt, 64) == expected


def test_batch_size_auto_is_one_row_on_a_cpu_and_gives_the_same_answers():
    auto, one = (load("kvcompressed", batch_size=n, **SNAPKV) for n in ("auto", 1))
    assert auto.generate_until(generations(), disable_tqdm=True) == one.generate_until(generations(), disable_tqdm=True)
    assert auto.loglikelihood(choices(), disable_tqdm=True) == one.loglikelihood(choices(), disable_tqdm=True)


@pytest.mark.parametrize("settings", [SNAPKV, {"method": "full"}, {"method": "no_cache"}], ids=lambda s: s["method"])
def test_batch_size_auto_on_an_accelerator_tries_what_will_be_run(settings, monkeypatch):
    """Three rows fit, of up to eight tried; the device is a CPU that takes itself for more."""
    lm = load("kvcompressed", batch_size="auto", max_batch_size=8, **settings)
    expected = lm.generate_until(generations(), disable_tqdm=True)
    monkeypatch.setattr(Run, "gains_by_batches", True)
    asked = with_memory_for(lm, 3, monkeypatch)
    assert lm.generate_until(generations(), disable_tqdm=True) == expected
    assert asked[:3] == [8, 4, 2]
