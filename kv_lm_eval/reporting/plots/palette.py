"""The colours of all pictures, each with its kin on dark paper; nothing is said by red against green.

Series are six hues near Okabe and Ito's, moved until every one stands out from the paper (3:1) and no two look alike to
a reader without red, green or blue cones; beyond six, a marker of its own tells a method. Better is blue, worse orange.
"""

from __future__ import annotations

import re

INK, PAPER, GRID = "#1B1F24", "#FFFFFF", "#E3E6EA"
AXIS, FAINT, BAND = "#9AA1A9", "#656E7A", "#F4F6F8"  # lines of axes; words beside the matter; every other row
GOOD, BAD = "#0B5CAD", "#A33A00"
COLOURS = ("#1644C2", "#B83607", "#10A48F", "#8C4F7B", "#CD7A00", "#9770D7")
MARKERS = "osD^vPX*<>hpd"
ON_LIGHT, ON_DARK = "#111418", "#FEFEFE"  # words on a coloured cell, which is the same on any paper
CHANGE = ("#E08A4F", "#F7F7F5", "#6FA8DC")  # worse, the same, better

DARK = {
    INK: "#E6E9ED",
    PAPER: "#1D232A",
    GRID: "#38414B",
    AXIS: "#76808B",
    FAINT: "#9AA4AF",
    BAND: "#252C34",
    GOOD: "#6CB4F5",
    BAD: "#FF9F66",
    **dict(zip(COLOURS, ("#4CA7FF", "#ED5921", "#2F9877", "#E46EC5", "#FFB761", "#B0C2EF"), strict=True)),
}


def look(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th of many, in pairs that come again only after 78."""
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


def for_either_paper(svg: str) -> str:
    """A picture whose colours follow the reader's choice of light or dark, where a page shows it."""
    names = {light.lower(): f"--of-{light[1:].lower()}" for light in DARK}
    dark = "".join(f"{name}:{DARK[light.upper()]};" for light, name in names.items())

    def either(found: re.Match[str]) -> str:
        name = names.get(found[2].lower())
        return found[0] if name is None else f"{found[1]}var({name}, {found[2]})"

    svg = re.sub(r"((?:fill|stroke): )(#[0-9a-fA-F]{6})", either, svg)
    style = f"<style>@media screen and (prefers-color-scheme: dark){{svg{{{dark}}}}}</style>"
    return re.sub(r"(<svg\b[^>]*>)", lambda found: found[1] + style, svg, count=1)
