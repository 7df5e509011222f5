"""Colours by numbers: told apart by readers without red, green or blue cones, and seen on light and dark paper."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from results import FULL, run, snapkv

from kv_lm_eval.reporting import load, plots, rows
from kv_lm_eval.reporting.plots import palette

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
EYES = {
    "all cones": np.eye(3),
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PAPERS = {"light": lambda colour: colour, "dark": lambda colour: palette.DARK[colour]}


def linear(colour: str) -> np.ndarray:
    share = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """WCAG's."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def seen(colour: str, eyes: str) -> np.ndarray:
    """In Oklab, where distances are those that eyes see (Ottosson 2020)."""
    light = np.clip(np.array(EYES[eyes]) @ linear(colour), 0, 1)
    cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    lab = [
        [0.2104542553, 0.793617785, -0.0040720468],
        [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.808675766],
    ]
    return np.array(lab) @ np.cbrt(np.array(cones) @ light)


def closest(colours) -> float:
    pairs = itertools.product(itertools.combinations(colours, 2), EYES)
    return min(float(np.linalg.norm(seen(a, eyes) - seen(b, eyes))) for (a, b), eyes in pairs)


@pytest.mark.parametrize("paper", PAPERS)
def test_series_are_told_apart_by_all_eyes_and_stand_out_from_the_paper(paper):
    on = PAPERS[paper]
    colours = [on(colour) for colour in (*palette.COLOURS, palette.INK)]
    assert closest(colours) > 0.1 > closest(OKABE_ITO)
    assert all(contrast(colour, on(palette.PAPER)) >= 3 for colour in colours)


@pytest.mark.parametrize("paper", PAPERS)
def test_words_of_pictures_are_read_on_their_paper(paper):
    on = PAPERS[paper]
    for words in (palette.INK, palette.FAINT, palette.GOOD, palette.BAD):
        for under in (palette.PAPER, palette.BAND):
            assert contrast(on(words), on(under)) >= 4.5, (words, under)
    assert closest([on(palette.GOOD), on(palette.BAD)]) > 0.15
    assert closest([palette.CHANGE[0], palette.CHANGE[2]]) > 0.1
    assert all(contrast(palette.ON_LIGHT, colour) >= 4.5 for colour in palette.CHANGE)


def test_no_two_methods_look_alike():
    assert len({palette.look(i) for i in range(len(palette.COLOURS) * len(palette.MARKERS))}) == 78


def test_every_colour_of_a_picture_has_its_kin_on_dark_paper_or_is_of_a_cell(tmp_path):
    from results import efficiency, mean_task, perplexity_task

    places = [{"context_length": n, "document_depth_percent": d} for n in (256, 512) for d in (0, 50, 100)]
    spread = {"median": 0.1, "p10": 0.05, "p90": 0.3, "n": 12}
    for i, compression in enumerate((FULL, *(snapkv(64, compress_every=n) for n in (16, 64)))):
        tasks = {
            "a": mean_task([float(i < 2), 1.0, 0.5] * 2, extra=places),
            "ppl": perplexity_task([(-30.0 - i - k, 10) for k in range(6)]),
        }
        run(tmp_path / str(i), compression, tasks, date=i + 1, stats={"efficiency": efficiency(ttft_s=spread)})
    report = rows.report(*load.read(tmp_path))
    for picture in plots.all_of(report, plots.needles.panels_of(report)):
        plots.write(picture, tmp_path)
        svg = (tmp_path / f"{picture.name}.svg").read_text()
        either = palette.for_either_paper(svg)
        assert svg == re.sub(r"<style>@media screen.*?</style>|var\(--of-\w+, (#\w+)\)", r"\1", either)
        left = set(re.findall(r"(?:fill|stroke): (#[0-9a-fA-F]{6})", either)) - {palette.ON_LIGHT.lower()}
        if picture.name not in ("summary", "needle_a"):  # whose cells are coloured on any paper
            assert not left, picture.name
        assert picture.csv.count("\n") > 1 and len({len(line) for line in picture.numbers}) == 1
        assert not any(isinstance(x, float) and not math.isfinite(x) for line in picture.numbers for x in line)
