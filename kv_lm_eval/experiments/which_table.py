"""The table of docs/which.md: kinds of methods by what they look at, what each costs and saves, and what was measured.

A method's kind follows from what its class declares, so that a new file is in the table without being named here. The
numbers are those of the measured table of docs/methods.md and of the CSV files of docs/results.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kv_lm_eval import files, listing
from kv_lm_eval.methods import base

SLOTS = 128  # of what is shown of the measured table
UNSEEN = "question_in_prompt=False"
DIVERGENCE, NEEDLES = Path("docs/results/equal_bytes_kl.csv"), Path("docs/results/needles.csv")
HEADS = (
    "what decides",
    "question needed?",
    "for",
    "the choice costs",
    "saves",
    f"kv-tiny finds, at {SLOTS} pairs",
    "question unseen",
    "SmolLM2: KL, nats",
    "finds",
)


class Kind(NamedTuple):
    """Methods that look at the same thing, in words for a row of the table."""

    decides: str
    question: str
    good_for: str
    cost: str
    saves: str


EVICTS, LATER = "memory and reading", "prompts whose question comes later"
KINDS = {
    "keeps": Kind("nothing: all stays", "no", "the comparison", "nothing", "nothing"),
    "form": Kind("nothing: all stays in fewer bytes", "no", "memory without eviction", "coding", "memory, no time"),
    "reads": Kind("each new token", "no", "long answers on a fast kernel", "bounds of pages", "reading, no memory"),
    "none": Kind("nothing is held", "no", "a baseline", "every token anew", "memory, at the price of time"),
    "place": Kind("position: first and newest tokens", "no", "streams without end", "nothing", EVICTS),
    "pair": Kind("keys and values themselves", "no", LATER, "little", EVICTS),
    "last": Kind(
        "the last queries", "**yes, last**", "long prompts, one question", "a small attention a layer", EVICTS
    ),
    "all": Kind(
        "attention of all queries so far", "counts little", "long answers, plain text", "sums of the attention", EVICTS
    ),
    "every": Kind("all queries of the prompt alike", "no", LATER, "products with every query", EVICTS),
    "again": Kind("a second reading of the prompt", "no", "many questions on it", "about 2 prefills more", EVICTS),
    "trained": Kind(
        "hidden states, by trained weights", "no", "prompts and answers", "a small product a token", EVICTS
    ),
}


def kind(cls: type[base.Method]) -> str:
    """Which of KINDS a method is of, by its example."""
    own = {k: v for k, v in cls.example(64).items() if k in cls.__dataclass_fields__}
    method = cls(**own)
    if not cls.uses_cache:
        return "none"
    if not cls.compresses:
        return "reads" if method.pages is not None else "form" if listing.is_storage(cls) else "keeps"
    if cls.reads_again:
        return "again"
    if cls.reads_hidden:
        return "trained"
    if cls.accumulates:
        return "all"
    if method.sinks_and_recent is not None:
        return "place"
    if cls.every_query or method.moments_from is not None:
        return "every"
    return "last" if method.num_queries else "pair"


def needs_no_question(name: str) -> bool:
    """Whether a method that evicts chooses among a prompt's tokens without their question."""
    cls = base.load(name)
    return cls.compresses and KINDS[kind(cls)].good_for in (LATER, KINDS["again"].good_for)


def text(needles: Mapping[str, str], folder: Path) -> str:
    """The table in Markdown.

    Args:
        needles: share found by the example of each method that was measured, by its name, and with UNSEEN after it.
        folder: of docs/.
    """
    names: dict[str, list[str]] = {name: [] for name in KINDS}
    for name in base.available():
        names[kind(base.load(name))].append(name)
    divergence, found = (_of_results(folder / path) for path in (DIVERGENCE, NEEDLES))
    rows = []
    for key, own in names.items():
        best = sorted(own, key=lambda name: (-float(needles.get(name, "-1")), name))
        seen = ", ".join(f"`{name}`{_goes_on(name)} {needles.get(name, '-')}" for name in best)
        unseen = [(name, needles[f"{name}, {UNSEEN}"]) for name in best if f"{name}, {UNSEEN}" in needles]
        real = [
            [(name, f"{float(row[column]):.2g}") for name, row in table.items() if name in own]
            for table, column in ((divergence, "kl"), (found, "contains"))
        ]
        numbers = [", ".join(f"{name} {share}" for name, share in cell) or "-" for cell in (unseen, *real)]
        rows.append([*KINDS[key], seen or "-", *numbers])
    return listing.table(HEADS, rows)


def _goes_on(name: str) -> str:
    """A mark for methods that go on cutting in the answer by themselves."""
    return "+" if base.load(name).presets.get("compress_every") else ""


def _of_results(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a table of results whose first column is a method's name, or begins with one, a comma and how it was set;
    by that name, of several the one without settings, else the first."""
    if not path.is_file():
        return {}
    out: dict[str, dict[str, str]] = {}
    rows = [(next(iter(row.values())), row) for row in csv.DictReader(io.StringIO(files.read_text(path)))]
    for said, row in sorted(rows, key=lambda pair: "," in pair[0]):
        out.setdefault(said.split(",")[0], row)
    return {name: row for name, row in out.items() if name in base.available()}
