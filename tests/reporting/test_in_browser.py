"""The report's page in a real browser: sorted, filtered, copied, linked to, saved; dark, on paper, on a phone."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
import re
from pathlib import Path

import browser
import pytest
from results import FULL, efficiency, mean_task, perplexity_task, plan, planned, point, run, snapkv

from kv_lm_eval.reporting import build
from kv_lm_eval.reporting.page import grids

ROWS = [FULL, *(snapkv(n) for n in (16, 128, 64)), {"method": "h2o", "max_capacity_prompt": 64}]
SORTED = "[...document.querySelectorAll('#scores tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[0].dataset.t)"
GRID = "#scores .grid"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Four of six points of a sweep done, two tasks of a group, a needle grid, a perplexity, times."""
    folder = tmp_path_factory.mktemp("browser") / "in"
    draw = random.Random(1)
    places = [{"context_length": n, "document_depth_percent": d} for n in (256, 512) for d in (0, 50, 100)] * 2
    points = []
    for i, compression in enumerate(ROWS):
        scores = [1.0 if i == 0 else float(draw.random() < 0.3 * i) for _ in places]
        tasks = {
            "kv_needle": mean_task(scores, "exact_match", extra=places),
            "qa_one": mean_task([0.9 - 0.2 * i, 0.5], "f1"),
            "qa_two": mean_task([0.7 - 0.1 * i, 0.4], "f1"),
            "kv_ppl": perplexity_task([(-30.0 - i - k, 10) for k in range(8)]),
        }
        times = {name: {"median": 0.1 + i, "p10": 0.05, "p90": 0.3 + i, "n": 12} for name in ("ttft_s", "tokens_per_s")}
        place = folder / "points" / f"p{i}"
        file = run(
            place / "toy",
            compression,
            tasks,
            date=i + 1,
            groups={"qa": {"tasks": ["qa_one", "qa_two"], "metric": "f1", "value": 0.6 - 0.1 * i}},
            stats={"efficiency": efficiency(**times)},
            model_args={"pretrained": "models/toy", **compression},
        )
        points.append(point(place, "", "done", compression, list(tasks), str(file.relative_to(place))))
    points.append(
        point(folder / "points" / "p8", "", "failed", {"method": "tova", "keep_ratio": 0.5}, ["kv_ppl"], None)
    )
    points.append(planned("p9", "", {"method": "knorm", "keep_ratio": 0.5}, ["kv_ppl"]))
    plan(folder, points, "a <b>sweep</b>")
    return build.write(folder, folder.parent / "out").page


@pytest.fixture(scope="module")
def page(report, tab):
    """Opened anew for each module, and as it was opened by whichever test opens it again."""
    tab.open(report)
    return tab


def table(report: Path, ending: str) -> str:
    return (report.parent / "tables" / f"scores.{ending}").read_text(encoding="utf-8")


def test_a_click_on_a_head_sorts_by_numbers_and_back(page, report):
    lines = list(csv.DictReader(io.StringIO(table(report, "csv"))))
    (name,) = [key for key in lines[0] if key.startswith("kv_ppl") and "stderr" not in key]
    number = {line["method"]: float(line[name]) for line in lines if line[name] not in ("failed", "planned")}
    column = page.js("[...document.querySelectorAll('#scores thead tr:last-child th')].map((h) => h.dataset.name)")
    head = f"#scores thead tr:last-child th:nth-child({column.index('kv_ppl') + 1}) button"
    for reverse in (False, True):
        page.click(head)
        wanted = sorted(number, key=lambda label: number[label], reverse=reverse)
        assert page.js(SORTED)[: len(number)] == wanted  # what has no number comes last either way
    page.js(f"document.querySelector('{head}').focus()")
    page.key("Enter")  # without a mouse
    assert page.js(SORTED)[0] == min(number, key=lambda label: number[label])


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        (
            "snapkv",
            ["snapkv max_capacity_prompt=16", "snapkv max_capacity_prompt=64", "snapkv max_capacity_prompt=128"],
        ),
        ("SNAPKV 64", ["snapkv max_capacity_prompt=64"]),
        ("-snapkv -h2o kept>=100", ["full"]),
        ("failed", ["tova keep_ratio=0.5"]),
        ("kept<30 -snapkv", ["h2o max_capacity_prompt=64"]),
        ("nothing like it", []),
    ],
)
def test_the_filter_leaves_what_was_asked_for_and_says_how_many(page, asked, left):
    page.write(f"{GRID} input", asked)
    assert sorted(page.js(SORTED)) == sorted(left)
    assert page.texts(f"{GRID} .count") == [f"{len(left)} of 7 rows"]
    page.write(f"{GRID} input", "")
    assert len(page.js(SORTED)) == 7 and page.texts(f"{GRID} .count") in ([""], [])


@pytest.mark.parametrize(("form", "ending"), [("latex", "tex"), ("markdown", "md"), ("csv", "csv")])
def test_what_is_copied_is_the_file_and_only_the_rows_that_are_shown(tab, report, form, ending):
    tab.open(report)
    tab.click(f"{GRID} [data-as={form}]")
    assert tab.copied() == table(report, ending)
    assert "7 rows copied as" in tab.texts(f"{GRID} .said")[0]
    tab.write(f"{GRID} input", "h2o")
    tab.click(f"{GRID} [data-as={form}]")
    assert "h2o" in tab.copied() and "snapkv" not in tab.copied() and "1 row copied" in tab.texts(f"{GRID} .said")[0]


def test_every_table_is_copied_as_its_file_has_it(tab, report):
    tab.open(report)
    for name in ("differences", "speed", "progress"):
        for form, ending in (("latex", "tex"), ("markdown", "md"), ("csv", "csv")):
            tab.click(f"#{name} [data-as={form}]")
            assert tab.copied() == (report.parent / "tables" / f"{name}.{ending}").read_text(encoding="utf-8"), name


def test_the_address_of_a_row_shows_it_whatever_the_filter_says(tab, report):
    tab.open(report, "#row-snapkv-max_capacity_prompt-128")
    row = "#row-snapkv-max_capacity_prompt-128"
    top = tab.js(f"document.querySelector('{row}').getBoundingClientRect().top")
    assert 0 < top < 900 and tab.texts(f"{row} th")[0].startswith("snapkv max_capacity_prompt=128")
    assert tab.colour(f"{row} td", "backgroundColor") != tab.colour("#row-full td", "backgroundColor")
    tab.write(f"{GRID} input", "h2o")
    tab.js("location.hash = '#row-snapkv-max_capacity_prompt-64'")
    tab.settle()
    assert not tab.js("document.getElementById('row-snapkv-max_capacity_prompt-64').hidden")
    tab.click("#row-full .address")
    assert tab.js("location.hash") == "#row-full"


def test_addresses_are_of_labels_and_no_two_are_one():
    labels = ["a b", "a  b!", "a-b", "a b 2", "é", "x=1,y=2"]
    made = grids.addresses(build.tables.Table("scores", "", [("", "")], [[build.tables.Value(x)] for x in labels]))
    assert made == ["row-a-b", "row-a-b-2", "row-a-b-3", "row-a-b-2-2", "row-", "row-x-1-y-2"]


def test_what_was_run_says_how_far_what_failed_and_how_to_run_it_again(page, report):
    (box,) = page.texts("#runs .box")
    assert "a <b>sweep</b>: 7 points planned: 5 done, 1 failed, 1 not started." in box
    assert "toy (float32, 7 rows)" in box and "kv_needle (12 documents)" in box and "lm-eval 0.4.13" in box
    assert page.texts("#runs .failed li") == ["tova keep_ratio=0.5: failed, OutOfMemoryError: too much"]
    page.click("#runs summary")
    page.click("#runs [data-copy=all]")
    lines = page.copied().splitlines()
    assert len(lines) == 7 and all(line.startswith("kv-lm-eval run --model kvcompressed") for line in lines)
    page.click("#runs h3 [data-copy]")
    assert page.copied().splitlines() == [line for line in lines if "method=full" in line]


def test_a_picture_is_saved_as_papers_want_it_with_its_numbers(tab, report):
    tab.open(report)
    tab.js(
        "window.saved = {}; URL.createObjectURL = (b) => { window.last = b; return 'data:,'; };"
        "HTMLAnchorElement.prototype.click = function () { window.saved[this.download] = window.last; };"
    )
    for kind in ("svg", "csv"):
        tab.click(f"#score_against_kept [data-save={kind}]")
        name = f"score_against_kept.{kind}"
        assert tab.js(f"window.saved['{name}'].text()") == (report.parent / "plots" / name).read_text(encoding="utf-8")
    figures = tab.texts("figure h3")
    assert (
        len(figures)
        == len(list((report.parent / "plots").glob("*.svg")))
        == tab.js("document.querySelectorAll('figure [data-save=svg]').length")
    )


def light(png: bytes) -> float:
    """The mean brightness of a picture, 0 to 1."""
    from matplotlib import image

    return float(image.imread(io.BytesIO(png))[..., :3].mean())


def test_in_the_dark_the_page_and_its_pictures_are_dark(tab, report):
    shown = {}
    for dark in (False, True):
        with tab.seen(dark=dark):
            tab.open(report)
            page = light(tab.picture())
            tab.point("#score_against_kept img")
            tab.js("document.querySelector('#score_against_kept img').decode()")
            tab.settle()
            box = tab.js(
                "(({x, y, width, height}) => ({x, y, width, height}))"
                "(document.querySelector('#score_against_kept img').getBoundingClientRect())"
            )
            clip = {**box, "x": box["x"] + tab.js("scrollX"), "y": box["y"] + tab.js("scrollY"), "scale": 1}
            png = base64.b64decode(tab.tell("Page.captureScreenshot", format="png", clip=clip)["data"])
            shown[dark] = page, light(png)
    assert min(shown[False]) > 0.85 and max(shown[True]) < 0.25


def test_on_paper_there_are_no_controls_and_no_dark(tab, report):
    with tab.seen(dark=True, media="print"):
        tab.open(report)
        assert not tab.texts(".tools, nav, .address, #samples") and tab.texts("#scores tbody th")
        assert tab.colour("body", "backgroundColor") == (255, 255, 255)
    assert base64.b64decode(tab.tell("Page.printToPDF", printBackground=True)["data"]).startswith(b"%PDF")


def test_it_is_read_without_scripts(tab, report):
    with tab.seen(script=False):
        tab.load(report, "#row-full")
        drawn = tab.tell("DOMSnapshot.captureSnapshot", computedStyles=["display"])
    words = " ".join(drawn["strings"])
    laid_out = {drawn["strings"][i] for i in drawn["documents"][0]["layout"]["text"] if i >= 0}
    assert "snapkv" in words and any("This part needs scripts" in text for text in laid_out)
    assert "LaTeX" not in laid_out and any("100.0" in text for text in laid_out)


def test_a_phone_scrolls_tables_and_pictures_not_the_page(tab, tmp_path):
    path = "a/rather/long/path/without/any/break_in_it/" * 4
    tasks = {
        f"kv_a_task_of_a_long_name_{i}": mean_task([1, 0, 1, 1, 0, 1, 1], answers=["x" * 300] * 7) for i in range(6)
    }
    run(tmp_path / "full", FULL, tasks)
    run(tmp_path / "snap", snapkv(profile=path), tasks)
    (tmp_path / "snap" / ("results_" + "damaged_" * 12 + ".json")).write_text("{")
    page = build.write(tmp_path, tmp_path / "report", title="A_title_of_one_word" * 6).page
    page.write_text(page.read_text(encoding="utf-8").replace("<details", "<details open"), encoding="utf-8")
    for width in (390, 480):
        with tab.seen(width=width):
            tab.open(page)
            tab.point("#samples")
            assert tab.js("[innerWidth, document.documentElement.scrollWidth]") == [width, width]


def test_answers_are_read_when_they_are_scrolled_to(tab, report):
    tab.open(report)
    assert tab.js("answers.tasks.length") == 0 and not tab.texts(".sample")
    tab.point("#samples")
    assert tab.js("answers.tasks.length") == 4 and len(tab.texts(".sample > summary")) == 12
    tab.click(".sample > summary")
    assert len(tab.texts(".sample[open] .sides > div")) == 2


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_their_paper(tab, report, dark):
    """4.5 to 1, which WCAG asks for, on every colour that lies under them."""
    under = {"--ink": "--paper --card --target", "--soft": "--paper --card", "--accent": "--paper --card"}
    under |= {
        "--better": "--paper --better-bg --target",
        "--worse": "--paper --worse-bg --target",
        "--noise": "--paper --card",
    }
    with tab.seen(dark=dark):
        tab.open(report)
        style = tab.js(
            "(() => { const s = getComputedStyle(document.documentElement); const out = {};"
            f"for (const name of {json.dumps(sorted({*under, *' '.join(under.values()).split()}))})"
            " out[name] = s.getPropertyValue(name).trim(); return out; })()"
        )
    colours = {name: tuple(bytes.fromhex(re.sub("^#", "", text))) for name, text in style.items()}
    for words, papers in under.items():
        for paper in papers.split():
            assert browser.contrast(colours[words], colours[paper]) >= 4.5, (words, paper)
