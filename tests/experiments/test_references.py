from __future__ import annotations

import pytest

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments.references import NotArithmetic, calculate, names_in, resolve


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2048 - 32", 2016),
        ("2048 - 4 - max(16, 64)", 1980),
        ("min(64, 7 // 2)", 3),
        ("-(3 + 4) * 2 % 5", -14 % 5),
        ("3 / 2", 1.5),
        ("4 <= 4", True),
        ("4 > 4 or 1 != 1", False),
        ("not 4 > 4 and 1 == 1", True),
    ],
)
def test_arithmetic(text: str, value: object) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "max",
        "abs(-1)",
        "__import__('os')",
        "(1).real",
        "[1][0]",
        "2 ** 9",
        "max(1, key=2)",
        "'a' + 'b'",
        "1 if 1 else 2",
        "",
    ],
)
def test_nothing_else_is_computed(text: str) -> None:
    with pytest.raises(NotArithmetic):
        calculate(text)


def test_whole_references_keep_their_type() -> None:
    scope = {"n": 4, "flag": True, "name": "max", "deep": {"k": ["${n}", 1]}}
    assert resolve("${n}", scope) == 4
    assert resolve("${flag}", scope) is True
    assert resolve("${name}", scope) == "max"
    assert resolve("${deep}", scope) == {"k": [4, 1]}
    assert resolve({"a": ["${n} - 1"]}, scope) == {"a": [3]}


def test_references_are_followed_and_texts_stay_texts() -> None:
    scope = {"total": 256, "sinks": 4, "window": "${total} - ${sinks}", "date": "2024-01-02"}
    assert resolve("${window} // 2", scope) == 126
    assert resolve("run ${total}-${sinks}", scope) == "run 256-4"
    assert resolve("2024-01-02", scope) == "2024-01-02"  # no reference, so it is left alone
    assert names_in({"a": ["${x}", {"b": "${ y }-1"}], "c": 3}) == {"x", "y"}


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="did you mean 'total'"):
        resolve("${totl}", {"total": 1})
    with pytest.raises(UserError, match="a -> b -> a"):
        resolve("${a}", {"a": "${b}", "b": "${a}"})
    with pytest.raises(UserError, match="divides by zero"):
        resolve("1 // ${a}", {"a": 0})
