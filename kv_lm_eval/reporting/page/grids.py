"""A table of the page: what to sort and filter by, what is copied, and an address for every row."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from html import escape

from kv_lm_eval.reporting.table import Table, Value

MAIN = "scores"  # the addresses of its rows are #row-LABEL
TALL = 30  # rows: more scroll in a box of their own, under their heads
TOOLS = """<div class="tools js">
<label>Filter <input type="search" placeholder="words, -words, kept&lt;30" size="22"></label>
<span class="count soft" role="status"></span>
<span>Copy as <button type="button" data-as="latex">LaTeX</button>
<button type="button" data-as="markdown">Markdown</button> <button type="button" data-as="csv">CSV</button>
<span class="said soft" role="status"></span></span></div>"""


def section(table: Table) -> str:
    """With its tools, its legend and its notes."""
    below = "".join(f'<p class="legend">{escape(text)}</p>' for text in [table.legend] if text)
    below += "".join(f'<p class="legend note">{escape(text)}</p>' for text in table.notes)
    names = addresses(table)
    rows = "\n".join(_row(row, name) for row, name in zip(table.rows, names, strict=True))
    tall = " tall" if len(table.rows) > TALL else ""
    title = escape(table.title)
    return (
        f'<div class="grid" data-name="{escape(table.name)}" data-title="{title}">{TOOLS}\n'
        f'<div class="wide{tall}" tabindex="0" role="region" aria-label="{title}"><table><thead>{_heads(table)}</thead>'
        f"<tbody>\n{rows}\n</tbody></table></div>\n{below}</div>"
    )


def addresses(table: Table) -> list[str]:
    """Of each row, the same as long as its label is; numbered where two are alike."""
    start = "row" if table.name == MAIN else f"{table.name}-row"
    out: dict[str, None] = {}
    for row in table.rows:
        name = f"{start}-{re.sub(r'[^A-Za-z0-9_.]+', '-', row[0].text).strip('-')}"
        numbered = (f"{name}-{i}" for i in itertools.count(2))
        out[name if name not in out else next(other for other in numbered if other not in out)] = None
    return list(out)


def _heads(table: Table) -> str:
    over = ""
    if any(title for title, _ in table.groups):
        cells = (
            f'<th scope="colgroup" colspan="{count}"{" class=titled" if title else ""}>{_breakable(title)}</th>'
            for title, count in table.groups
        )
        over = f'<tr class="groups">{"".join(cells)}</tr>'
    heads = (
        f'<th scope="col" data-name="{escape(name)}" data-unit="{escape(unit)}"{" data-errors" if errors else ""}>'
        f'<button type="button" title="sort">{escape(name)}</button>'
        + (f"<small>{escape(unit)}</small>" if unit else "")
        + "</th>"
        for (name, unit), errors in zip(table.head, table.with_errors, strict=True)
    )
    return f"{over}<tr>{''.join(heads)}</tr>"


def _row(row: Sequence[Value], name: str) -> str:
    label = row[0].text
    link = f'<a class="address" href="#{name}" aria-label="Address of this row">#</a>'
    head = f'<th scope="row" data-t="{escape(label)}">{_breakable(label)} {link}</th>'
    return f'<tr id="{name}">{head}{"".join(map(_cell, row[1:]))}</tr>'


def _cell(value: Value) -> str:
    words = {
        "class": value.tone,
        "data-v": "" if value.number is None else repr(value.number),
        "data-e": "" if value.error is None else repr(value.error),
        "data-t": value.text if value.lines else "",
        "title": value.title,
    }
    given = "".join(f' {key}="{escape(text)}"' for key, text in words.items() if text)
    first, _, second = (value.lines or value.text).partition("\n")
    return f"<td{given}>{escape(first)}{f'<small>{escape(second)}</small>' if second else ''}</td>"


def _breakable(text: str) -> str:
    """A label that breaks between its words, where the window is narrow, and then within them."""
    words = (re.sub(r"([_=,/])", r"\1<wbr>", escape(word)) for word in text.split(" "))
    return " ".join(f"<span>{word}</span>" for word in words)
