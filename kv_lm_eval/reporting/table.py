"""A table, and how it is written: markdown, CSV and LaTeX (booktabs)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """One entry: its text, the number to sort by, its look (better, worse, noise, bad, base), and an explanation."""

    text: str
    number: float | None = None
    tone: str = ""
    title: str = ""
    lines: str = ""  # the same on two lines, for a page


@dataclass(frozen=True)
class Table:
    """A table: the head of a column is (name, what it is in a word); the first column holds the labels."""

    name: str
    title: str
    head: list[tuple[str, str]]
    rows: list[list[Value]]
    legend: str = ""
    notes: list[str] = field(default_factory=list)


def full_head(head: tuple[str, str]) -> str:
    """A column's name, with what it is."""
    return f"{head[0]} ({head[1]})" if head[1] else head[0]


def as_markdown(table: Table) -> str:
    """GitHub's tables, aligned, with the legend below."""
    grid = [[full_head(h) for h in table.head], *([v.text for v in row] for row in table.rows)]
    grid = [[" ".join(text.split()).replace("|", "\\|") for text in line] for line in grid]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]

    def line(texts: Sequence[str]) -> str:
        cells = [t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    below = [text for text in (table.legend, *table.notes) if text]
    return (
        "\n".join([f"### {table.title}", "", line(grid[0]), rule, *map(line, grid[1:]), *(f"\n{t}" for t in below)])
        + "\n"
    )


def as_csv(table: Table, exact: bool = True) -> str:
    """Full precision where an entry is one number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([full_head(h) for h in table.head])
    for row in table.rows:
        writer.writerow([repr(v.number) if exact and v.number is not None else v.text for v in row])
    return out.getvalue()


LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}"}
LATEX |= {"±": r"$\pm$", "−": "$-$", "≈": r"$\approx$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "°": r"$^\circ$"}
LATEX |= {"…": r"\dots{}"}


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(LATEX.get(character, character) for character in text)


def as_latex(table: Table) -> str:
    r"""A table environment with booktabs (\usepackage{booktabs})."""

    def line(texts: Sequence[str], dress: Callable[[str], str] = escape_latex) -> str:
        return " & ".join(map(dress, texts)) + r" \\"

    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}. {escape_latex(table.legend)}}}",
    ]
    lines += [rf"\label{{tab:{table.name}}}", rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule"]
    lines += [line([name for name, _ in table.head]), line([unit for _, unit in table.head]), r"\midrule"]
    lines += [line([value.text for value in row]) for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"
