"""The table of scores, to paste where text cannot go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kv_lm_eval import fit
from kv_lm_eval.reporting.plots import drawing
from kv_lm_eval.reporting.plots.drawing import Picture
from kv_lm_eval.reporting.plots.palette import BAD, BAND, GOOD, INK
from kv_lm_eval.reporting.table import Table, full_head

SIZE = 8.5  # of the letters, in points
LINE, GAP = 0.17, 0.13  # inches: of a line of text, and between rows
WIDEST_HEAD, WIDEST = 1.5, 4.0  # inches, then they are wrapped
MAX_ROWS = 48


def draw(table: Table) -> Picture:
    """Every entry in its place; rows as high as their lines."""
    rows = table.rows[:MAX_ROWS]
    heads = [f"{name}\n{unit}" if unit else name for name, unit in table.head]
    texts = [[fit.wrap(head, WIDEST_HEAD, SIZE, bold=True) for head in heads]]
    texts += [[fit.wrap(value.text, WIDEST, SIZE) for value in row] for row in rows]
    tones = [["head"] * len(heads), *([value.tone for value in row] for row in rows)]
    columns = list(zip(*texts, strict=True))
    widths = [max(fit.inches(text, SIZE, bold=i == 0) for i, text in enumerate(column)) + 0.25 for column in columns]
    heights = [LINE * max(text.count("\n") + 1 for text in line) + GAP for line in texts]
    figure, axes = drawing.new_figure(sum(widths) + 0.2, sum(heights) + 0.2)
    axis = axes[0, 0]
    axis.set_axis_off()
    axis.set_xlim(0, sum(widths))
    axis.set_ylim(sum(heights), 0)
    colours = {"better": GOOD, "worse": BAD, "bad": BAD}
    for i, (line, tone, height) in enumerate(zip(texts, tones, heights, strict=True)):
        y = sum(heights[:i])
        if i and i % 2 == 0:
            axis.axhspan(y, y + height, color=BAND, lw=0)
        for j, text in enumerate(line):
            x, align = (0.1, "left") if j == 0 else (sum(widths[: j + 1]) - 0.1, "right")
            look = {"fontsize": SIZE, "fontweight": "bold" if i == 0 else "normal", "color": colours.get(tone[j], INK)}
            axis.text(x, y + height / 2, text, ha=align, va="center", **look)
    axis.axhline(heights[0], color=INK, lw=1)
    caption = "Blue is better, orange worse: outside noise, see the differences. " + table.legend
    if len(table.rows) > MAX_ROWS:
        caption += f" The first {MAX_ROWS} of {len(table.rows)} rows; the numbers are of all."
    numbers: list[Sequence[Any]] = [[full_head(head) for head in table.head]]
    numbers += [[v.text if v.number is None else v.number for v in row] for row in table.rows]
    return Picture("table", "The table as a picture", caption, figure, numbers)
