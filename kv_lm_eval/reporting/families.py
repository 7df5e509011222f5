"""Which columns of scores stand together: the tasks of one group, else those with one metric."""

from __future__ import annotations

from collections.abc import Sequence

from kv_lm_eval.reporting.cells import Column

WAYS = {True: "more is better", False: "less is better", None: ""}


def in_order(columns: Sequence[Column]) -> list[Column]:
    """Families one after the other, as their first columns come; within one, its tasks before their mean."""
    family = {column: of(column, columns) for column in columns}
    found = list(dict.fromkeys(family.values()))
    return sorted(columns, key=lambda column: (found.index(family[column]), bool(column.leaves)))


def of(column: Column, columns: Sequence[Column]) -> str:
    """The name of the smallest group that a task is in, a group's own, else the metric and which way is better."""
    if column.leaves:
        return column.task
    around = [group for group in columns if column.task in group.leaves]
    if around:
        return min(around, key=lambda group: len(group.leaves)).task
    return ": ".join(filter(None, (column.metric, WAYS[column.higher_is_better])))


def titles(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """The families of columns that are in order, each with how many columns it has."""
    out: list[tuple[str, int]] = []
    for column in columns:
        family = of(column, columns)
        if out and out[-1][0] == family:
            out[-1] = (family, out[-1][1] + 1)
        else:
            out.append((family, 1))
    return out
