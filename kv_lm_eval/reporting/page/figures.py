"""A picture of the page: drawn when it is scrolled to, in the reader's light or dark, with its numbers below."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

from kv_lm_eval.reporting.plots import palette
from kv_lm_eval.reporting.plots.drawing import Picture

PIXELS = 4 / 3  # a point


def section(picture: Picture, folder: Path) -> str:
    """The figure, what it shows, its numbers as CSV, and buttons that save both."""
    svg = (folder / f"{picture.name}.svg").read_text(encoding="utf-8")
    size = re.search(r'<svg\b[^>]* width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    given = (
        "" if size is None else ' width="{:.0f}" height="{:.0f}"'.format(*(PIXELS * float(n) for n in size.groups()))
    )
    source = base64.b64encode(palette.for_either_paper(svg).encode()).decode("ascii")
    name, title = escape(picture.name), escape(picture.title)
    return (
        f'<figure id="{name}"><h3>{title}</h3><div class="wide" tabindex="0" role="region" aria-label="{title}">'
        f'<img alt="{title}"{given} loading="lazy" decoding="async" '
        f'src="data:image/svg+xml;base64,{source}"></div><figcaption>{escape(picture.caption)}</figcaption>'
        f'<div class="tools js"><button type="button" data-save="svg">Save as SVG</button>'
        f'<button type="button" data-save="csv">Save its numbers as CSV</button></div>'
        f"<details><summary>Its numbers</summary><pre>\n{escape(picture.csv)}</pre></details></figure>"
    )
