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
    error: float | None = None  # the number's standard error


@dataclass(frozen=True)
class Table:
    """A table: the head of a column is (name, what it is in a word); the first column holds the labels.

    Attributes:
        groups: titles over neighbouring columns, each with how many it is over; "" over those that need none.
        errors_from: from which column on a CSV has a column beside each with the standard errors.
    """

    name: str
    title: str
    head: list[tuple[str, str]]
    rows: list[list[Value]]
    legend: str = ""
    notes: list[str] = field(default_factory=list)
    groups: list[tuple[str, int]] = field(default_factory=list)
    errors_from: int | None = None

    @property
    def with_errors(self) -> list[bool]:
        """Of each column, whether a CSV has its standard errors."""
        return [self.errors_from is not None and i >= self.errors_from for i in range(len(self.head))]


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


def as_csv(table: Table) -> str:
    """Full precision where an entry is one number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [full_head(h) for h in table.head]
    writer.writerow(_beside(table, heads, [f"{head} stderr" for head in heads]))
    for row in table.rows:
        texts = [v.text if v.number is None else repr(v.number) for v in row]
        writer.writerow(_beside(table, texts, ["" if v.error is None else repr(v.error) for v in row]))
    return out.getvalue()


def _beside(table: Table, texts: list[str], errors: list[str]) -> list[str]:
    columns = zip(texts, errors, table.with_errors, strict=True)
    return [text for one, error, has in columns for text in ([one, error] if has else [one])]


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
    lines += _latex_groups(table)
    lines += [line([name for name, _ in table.head]), line([unit for _, unit in table.head]), r"\midrule"]
    lines += [line([value.text for value in row]) for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _latex_groups(table: Table) -> list[str]:
    """Titles over neighbouring columns, with a rule below each."""
    if not any(title for title, _ in table.groups):
        return []
    heads, rules, column = [], [], 1
    for title, count in table.groups:
        heads.append(rf"\multicolumn{{{count}}}{{c}}{{{escape_latex(title)}}}")
        rules += [rf"\cmidrule(lr){{{column}-{column + count - 1}}}"] if title else []
        column += count
    return [" & ".join(heads) + r" \\", " ".join(rules)]
