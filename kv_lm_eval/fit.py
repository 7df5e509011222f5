"""Text that fits its picture: measured as it will be drawn, then wrapped, never cut off."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

POINTS = 72  # an inch
LEGEND_ROOM = 0.6  # inches that figures have for a legend anyway


@functools.cache
def inches(text: str, size: float, bold: bool = False) -> float:
    """The width of a line of text, of the widest where there are several.

    Args:
        size: of the letters, in points.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    measure = TextToPath().get_text_width_height_descent
    return max(measure(line or " ", font, ismath=False)[0] for line in text.split("\n")) / POINTS


def wrap(text: str, width: float, size: float, bold: bool = False) -> str:
    """Lines of at most `width` inches, broken at spaces, else after one of `_=,/`, else anywhere."""
    out = []
    for line in text.split("\n"):
        current = ""
        for part in _parts(line, width, size, bold):
            if current and inches((current + part).rstrip(), size, bold) > width:
                out.append(current.rstrip())
                current = ""
            current += part
        out.append(current.rstrip())
    return "\n".join(out)


def _parts(line: str, width: float, size: float, bold: bool) -> list[str]:
    parts = []
    for word in re.findall(r"\S*\s*", line):
        if inches(word.rstrip(), size, bold) <= width:
            parts.append(word)
            continue
        for piece in re.findall(r"[^_=,/]*[_=,/]?", word):
            parts += [piece] if inches(piece.rstrip(), size, bold) <= width else list(piece)
    return [part for part in parts if part]


def legend_below(figure: Any, handles: Mapping[str, Any], size: float = 8, colour: str = "#1B1F24") -> None:
    """A legend under all axes, with as many columns as the figure is wide; a long one makes the figure higher, so that
    it takes no room from the axes."""
    width = figure.get_size_inches()[0] - 0.3
    handle = 5.2 * size / POINTS  # its picture and the space around it, see legend.handlelength and the like
    names = [wrap(name, width - handle, size) for name in handles]
    widest = max(inches(name, size) for name in names) + handle
    columns = max(1, min(len(names), 6, int(width / widest)))
    lines = sum(name.count("\n") + 1 for name in names) / columns
    if (more := 1.55 * size / POINTS * lines - LEGEND_ROOM) > 0:
        figure.set_size_inches(figure.get_size_inches()[0], figure.get_size_inches()[1] + more)
    look = {"ncols": columns, "fontsize": size, "frameon": False, "labelcolor": colour}
    figure.legend(handles.values(), names, loc="outside lower center", **look)
