"""One place makes caches: a class that cannot serve a method refuses it, and nobody else picks a class."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.cache.refresh import Refresh
from kv_lm_eval.cache.ring import Ring
from kv_lm_eval.cache.segment import Segment
from kv_lm_eval.engine.stepwise import steps
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.methods import base

ROOT = Path(__file__).parents[2]
REFRESH = {"method": "streaming_llm", "n_sink": 2, "window_size": 8, "refresh_budget": 4, "refresh_policy": "uniform"}
RING = {"method": "streaming_ring", "n_sink": 2, "window_size": 8}
# The second runs whole caches, to look at the model, as the third does; the fourth knows how long its documents are.
MAKERS = {
    "cache/make.py",
    "engine/check.py",
    "analysis/head_statistics.py",
    "engine/streaming.py",
    "cache/cache.py",
} | {"analysis/kept.py", "bench/estimate.py", "bench/goals.py"}


def classes() -> set[type[Segment]]:
    found, left = set(), [Segment]
    while left:
        one = left.pop()
        found.add(one)
        left += [c for c in one.__subclasses__() if c.__module__.startswith("kv_lm_eval")]
    return found


@pytest.mark.parametrize(("settings", "right"), [(REFRESH, Refresh), (RING, Ring)])
def test_only_the_right_class_takes_a_method_that_needs_more_than_dropping(settings, right) -> None:
    facts, compression = tiny.pair("llama").facts, tiny.compression(**settings)
    assert type(make_cache(compression, facts).segments[0]) is right
    for wrong in (Segment, Refresh, Ring):
        if wrong is not right:
            with pytest.raises(TypeError, match="make_cache gives the right class"):
                wrong(compression, facts)


def choosers(source: str) -> Iterator[str]:
    """Names of cache classes that are called, or handed to something that will call them."""
    names = {c.__name__ for c in (CompressedCache, Segment, Ring, Refresh)}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname for a in node.names if a.name in names and a.asname}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            continue
        for part in (node.func, *node.args, *(k.value for k in node.keywords)):
            for inner in ast.walk(part) if not isinstance(part, ast.Call) else ():
                if getattr(inner, "id", getattr(inner, "attr", "")) in names:
                    yield ast.unparse(node)


def test_no_other_file_picks_a_class_of_cache() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {call}"
        for folder in ("kv_lm_eval", "scripts", "needle", "longbench_tasks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not any(file.as_posix().endswith(f"kv_lm_eval/{maker}") for maker in MAKERS)
        for call in choosers(file.read_text(encoding="utf-8"))
    ]
    assert not found, "take kv_lm_eval.cache.make.make_cache"
    assert list(choosers("partial(CompressedCache, c, f)")) and list(choosers("f(lambda: cache.Ring(c, f))"))
    assert not list(choosers("isinstance(cache, Ring)"))


@pytest.mark.parametrize("name", base.available())
def test_every_class_of_cache_belongs_to_somebody(name: str) -> None:
    """The class that make_cache takes is the plainest one that does not refuse."""
    compression, facts = tiny.compression(**base.example(name, 32)), tiny.pair("llama").facts
    needed = {what for what in ("ring", "reinserted", "pages") if getattr(compression.method, what)}
    assert needed <= set(type(make_cache(compression, facts).segments[0]).serves)
    assert {what for c in classes() for what in c.serves} == {"ring", "reinserted", "pages"}


@pytest.mark.parametrize("settings", [REFRESH, {**REFRESH, "compress_every": 5}, RING])
def test_step_by_step_and_whole_documents_agree_under_the_cache_that_was_made(settings) -> None:
    pair, row = tiny.pair("llama"), tiny.tokens(60)
    compression = tiny.compression(**settings)
    every = compression.schedule.compress_every
    taken = list(steps(pair.model, lambda: make_cache(compression, pair.facts), row, 0))
    (fast,), _ = score_documents(
        pair.model, lambda: make_cache(compression, pair.facts), [row[1:]], Stream(row[0], every)
    )
    assert [-step.nll for step, _ in taken] == pytest.approx(fast.log_probs.tolist(), abs=1e-4)
