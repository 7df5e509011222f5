"""DuoAttention's patterns: which heads they make stream, and what these keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from kv_lm_eval.engine.prefill import feed
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import head_profile

Pattern = Callable[..., str]
WEIGHTS = [[0.9, -1e-4], [0.3, 2.0]]  # two layers of two KV heads; numbers are cut to 0 .. 1


@pytest.fixture
def pattern(tmp_path: Path) -> Pattern:
    def write(weights: object = WEIGHTS, **config: object) -> str:
        np.savetxt(tmp_path / "full_attention_heads.tsv", np.array(weights), delimiter="\t")
        words = {"sink_size": 3, "recent_size": 5, "model_name": "models/Tiny", "seed": 42, **config}
        (tmp_path / "config.json").write_text(json.dumps(words))
        return str(tmp_path / "full_attention_heads.tsv")

    return write


def streams(path: str, share: float | None) -> list[list[bool]]:
    return [[head.window != -1 for head in layer] for layer in head_profile.load_duo(path, share).heads]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (None, [[False, True], [True, False]]),
        (0.0, [[False, False], [False, False]]),
        (0.25, [[False, True], [False, False]]),
        (0.7, [[True, True], [True, False]]),
        (1.0, [[True, True], [True, True]]),
    ],
)
def test_the_heads_with_the_smallest_numbers_stream(share: float | None, expected: object, pattern: Pattern) -> None:
    assert streams(pattern(), share) == expected


def test_of_equal_numbers_the_earlier_heads_stream_and_one_half_does_not(pattern: Pattern) -> None:
    path = pattern([[0.5, 0.5], [0.5, 0.5], [0.49, 1.0]])
    assert streams(path, None) == [[False, False], [False, False], [True, False]]
    assert streams(path, 0.5) == [[True, True], [False, False], [True, False]]
    assert streams(pattern([[-3.0, -1.0], [2.0, 1.0]]), 0.75) == [[True, True], [True, False]], "cut to 0 .. 1 first"


@pytest.mark.parametrize("folder", [False, True])
def test_streaming_heads_keep_first_and_last_tokens_while_they_go_on_and_the_others_everything(
    folder: bool, pattern: Pattern
) -> None:
    """Of the prompt sink_size + recent_size pairs, as in kvpress; then the same number at every token."""
    path, pair = pattern(), tiny.pair("llama")
    path = str(Path(path).parent) if folder else path
    rows = [tiny.tokens(30, seed=1), tiny.tokens(6, seed=2)]
    cache = pair.cache(method="head_aware", profile=path)
    assert cache.compression.settings()["profile_heads"] == {"positional": 2, "mixed": 0, "gathering": 2, "dead": 0}
    for step in range(4):
        feed(pair.model, cache, rows if not step else [[9 + step], [8 + step]])
        for b, row in enumerate(rows):
            n = len(row) + step
            streaming = sorted({*range(min(n, 3)), *range(max(0, n - 5), n)})
            whole = list(range(n))
            assert heads(cache, 0, b) == [whole, streaming] and heads(cache, 1, b) == [streaming, whole]
    once = pair.cache(method="head_aware", profile=path, compress_every=0, n_sink=1, positional_window=3)
    feed(pair.model, once, rows)
    assert heads(once, 0, 0) == [list(range(30)), [0, 28, 29]]


def heads(cache: object, layer: int, row: int) -> list[list[int]]:
    found = tiny.kept(cache, layer, row)  # type: ignore[arg-type]
    return found * 2 if len(found) == 1 else found


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sparsity": 1.5}, "outside .0, 1."),
        ({"mode": "simulate"}, "names KV heads"),
        ({"confidence": 0.5, "base_window": 9}, "confidence=0.5 has no effect with a DuoAttention"),
        ({"gathering_window": 9}, "gathering_window=9 has no effect with a DuoAttention"),
        ({"preset": "G_conf"}, "preset=G_conf has no effect with a DuoAttention"),
        ({"max_capacity_prompt": 9}, "the budget of every head is fixed"),
    ],
)
def test_settings_without_effect_are_refused(more: dict[str, object], words: str, pattern: Pattern) -> None:
    with pytest.raises(UserError, match=words) as caught:
        tiny.compression(method="head_aware", profile=pattern(), **more)
    assert "\n" not in str(caught.value)


def test_other_files_are_told_from_patterns_in_one_line(pattern: Pattern, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sparsity=0.5 has no effect without a DuoAttention pattern"):
        tiny.compression(method="head_aware", base_window=9, sparsity=0.5)
    with pytest.raises(UserError, match="no such file"):
        tiny.compression(method="head_aware", profile="nothing.tsv")
    path = pattern(recent_size=0)
    with pytest.raises(UserError, match="recent_size"):
        tiny.compression(method="head_aware", profile=path)
    path = pattern()
    for text, words in (
        ("0.5\t0.5\n0.1\n", "as many numbers in each line, this one has .1, 2."),
        ("0.5\tx\n", "line 1: 'x' is no number"),
        ("0.5\tnan\n", "line 1: 'nan' is no number"),
        ("\n", "as many numbers in each line"),
    ):
        Path(path).write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            tiny.compression(method="head_aware", profile=path)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json beside it"):
        tiny.compression(method="head_aware", profile=path)


def test_a_pattern_of_another_model_is_refused(pattern: Pattern) -> None:
    facts = tiny.pair("llama").facts
    tiny.compression(method="head_aware", profile=pattern()).check_model(facts)
    for weights in ([[0.1, 0.2, 0.3, 0.4]] * 2, [[0.1, 0.2]] * 3):
        with pytest.raises(UserError, match="made for models/Tiny"):
            tiny.compression(method="head_aware", profile=pattern(weights)).check_model(facts)
