"""A report's pictures: matplotlib figures by name, a file each, left out where its numbers are not there."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from kv_lm_eval import files
from kv_lm_eval.reporting import tables
from kv_lm_eval.reporting.cells import Report
from kv_lm_eval.reporting.plots import (
    comparison,
    compress_every,
    fidelity,
    needles,
    score_against_kept,
    summary,
    table,
    trade_off,
)
from kv_lm_eval.reporting.plots.drawing import Picture


def all_of(report: Report, needle_panels: Sequence[Any] = ()) -> list[Picture]:
    """Every picture that the report has numbers for."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a name is a dollar
        made = [
            score_against_kept.draw(report),
            trade_off.draw(report),
            summary.draw(report),
            comparison.draw(report),
            compress_every.draw(report),
            *fidelity.draw(report),
            *needles.draw(needle_panels),
            table.draw(tables.scores(report)),
        ]
    return [picture for picture in made if picture is not None]


def write(picture: Picture, folder: Path) -> list[Path]:
    """NAME.png, NAME.svg and NAME.csv, the same bytes for the same numbers."""
    import matplotlib

    written = [folder / f"{picture.name}.png", folder / f"{picture.name}.svg"]
    with matplotlib.rc_context({"svg.hashsalt": "kv-lm-eval"}):
        files.write_whole(written[0], _image(picture.figure, "png", dpi=130, metadata={"Software": None}))
        picture.figure.set_layout_engine("none")  # it is laid out, and that is most of the time
        files.write_whole(written[1], _image(picture.figure, "svg", metadata={"Date": None}))
    written.append(folder / f"{picture.name}.csv")
    files.write_whole(written[2], picture.csv)
    return written


def _image(figure: Any, kind: str, **how: Any) -> bytes:
    out = BytesIO()
    figure.savefig(out, format=kind, **how)
    return out.getvalue()
