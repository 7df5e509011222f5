"""`${name}` in a sweep's configuration, and arithmetic over what it stands for.

A value is resolved in two steps: each `${name}` is replaced by what the name stands for, then, if the text has become
an arithmetic expression of numbers, it is computed. So `${total} - ${n_sink}` is a number and `run-${total}` a text.
The arithmetic is read from Python's syntax tree: numbers, + - * // / %, comparisons, and/or/not, min and max; nothing
else is looked at, let alone run.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from kv_lm_eval.errors import UserError, close_names

REFERENCE = re.compile(r"\$\{\s*([A-Za-z_]\w*)\s*\}")
_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_UNARY: dict[type[ast.AST], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_CALLS: dict[str, Callable[..., Any]] = {"min": min, "max": max}


class NotArithmetic(ValueError):
    """The text is something else than arithmetic over numbers."""


def names_in(value: Any) -> set[str]:
    """Names that a value refers to, at any depth."""
    if isinstance(value, str):
        return set(REFERENCE.findall(value))
    if isinstance(value, Mapping):
        return set().union(*map(names_in, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(names_in, value))
    return set()


def resolve(value: Any, scope: Mapping[str, Any], path: tuple[str, ...] = (), arithmetic: bool = True) -> Any:
    """`value` without references: those of its parts and of what they refer to are followed.

    Args:
        value: anything YAML holds.
        scope: what each name stands for; may refer to other names.
        path: names being resolved, to find circles.
        arithmetic: compute what has become arithmetic; not of names, where `4 + ${window}` is a text.

    Raises:
        UserError: an unknown name, a circle, or a division by zero.
    """
    if isinstance(value, Mapping):
        return {key: resolve(part, scope, path, arithmetic) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolve(part, scope, path, arithmetic) for part in value]
    if not isinstance(value, str) or not REFERENCE.search(value):
        return value

    def stands_for(name: str) -> Any:
        if name in path:
            circle = " -> ".join([*path, name])
            raise UserError(f"${{{name}}} refers to itself ({circle}); a setting hides a variable of the same name")
        if name not in scope:
            raise UserError(f"${{{name}}} is not defined{close_names(name, scope)}: give it under `vars` or beside it")
        return resolve(scope[name], scope, (*path, name))

    if whole := REFERENCE.fullmatch(value.strip()):
        return stands_for(whole[1])
    text = REFERENCE.sub(lambda match: str(stands_for(match[1])), value)
    if not arithmetic:
        return text
    try:
        return calculate(text)
    except NotArithmetic:
        return text
    except ZeroDivisionError as error:
        raise UserError(f"{value!r} became {text!r}, which divides by zero") from error


def calculate(text: str) -> Any:
    """The value of an arithmetic expression.

    Raises:
        NotArithmetic: where the text holds anything but numbers, operators, brackets, min and max.
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, TypeError, MemoryError, OverflowError) as error:
        raise NotArithmetic(text) from error


def _value(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part) for part in parts)
        case ast.BoolOp(op=ast.Or(), values=parts):
            return any(_value(part) for part in parts)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in _CALLS:
            return _CALLS[name](*map(_value, args))
    raise NotArithmetic(ast.dump(node))
