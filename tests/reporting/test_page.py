"""Files of a report: the page stands alone, shows texts as texts, and stays small; the pictures are there when due."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser

import pytest
from results import FULL, efficiency, mean_task, perplexity_task, run, snapkv

from kv_lm_eval.reporting import build, load, page, plots, rows, tables
from kv_lm_eval.reporting.table import as_csv, as_latex, as_markdown

NAME = "</script><script>alert(1)</script><img src=x onerror=alert(2)> $x_$ & \u2028"
EVIL = NAME + "\ud83d"  # half of a surrogate pair, as some answers end


class Page(HTMLParser):
    """Elements, attributes, and the data inside the page; unclosed or crossed elements are an error."""

    VOID = {"meta", "img", "input", "br", "link", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.data = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][1].get("id") == "samples-data":
            self.data += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three methods with times, a needle grid, a perplexity and hostile answers."""
    tmp_path = tmp_path_factory.mktemp("reporting")
    draw = random.Random(0)
    places = [{"context_length": n, "document_depth_percent": d} for n in (256, 512) for d in (0, 50, 100)] * 2
    pairs = [(-30.0 - i, 10) for i in range(8)]
    settings = [FULL, snapkv(64, compress_every=16), snapkv(64, compress_every=64), {"method": NAME, "keep_ratio": 0.5}]
    for i, compression in enumerate(settings):
        scores = [1.0 if i == 0 else float(draw.random() < 0.6) for _ in places]
        tasks = {
            "needle": mean_task(scores, "found", extra=places, answers=[EVIL] * 12, prompt="x" * 2000 + EVIL + "{}"),
            "ppl": perplexity_task([(ll - i, n) for ll, n in pairs]),
        }
        times = {name: {"median": 0.1 + i, "p10": 0.05, "p90": 0.3 + i, "n": 12} for name in ("ttft_s", "tokens_per_s")}
        run(
            tmp_path / "in" / str(i),
            compression,
            tasks,
            date=i + 1,
            stats={"efficiency": efficiency(**times)},
        )
    return tmp_path / "in"


@pytest.fixture(scope="module")
def written(folder):
    """Its report: drawing takes seconds."""
    return build.write(folder, folder.parent / "out", title=NAME)


def test_the_page_stands_alone_and_shows_texts_as_texts(written):
    text = written.page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 4 and "onerror" not in {name for _, name, _ in page.attributes}
    links = [value for _, name, value in page.attributes if name in ("src", "href", "action", "data")]
    assert links and all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in links)
    assert not re.findall(r"https?://|@import|url\(", text)
    data = json.loads(page.data)
    assert {"needle, found", "ppl, word_perplexity"} == {task["name"] for task in data["tasks"]}
    needle = data["tasks"][0]
    assert needle["rows"][0] == "full" and len(needle["docs"]) == 12 and needle["left_out"] == 0
    first = needle["docs"][0]
    assert first["cut"] and first["prompt"].startswith("x") and len(first["prompt"]) == 700
    assert first["answers"][0][0].startswith("</script>") and first["where"].startswith("256 tokens")
    assert all(picture.name.endswith((".png", ".svg", ".csv")) for picture in (written.page.parent / "plots").iterdir())


def test_the_pictures_that_the_numbers_allow(written, tmp_path):
    names = "comparison compress_every needle_needle score_against_kept summary table trade_off".split()
    assert sorted(p.stem for p in (written.page.parent / "plots").glob("*.png")) == names
    only = tmp_path / "only"
    run(only, None, {"one": mean_task([1.0, 0.0])})
    build.write(only, tmp_path / "out2")
    assert sorted(p.stem for p in (tmp_path / "out2" / "plots").glob("*.png")) == ["score_against_kept", "table"]


def test_the_same_files_every_time(tmp_path):
    for i, compression in enumerate((FULL, snapkv())):
        values = [1.0, 0.0, float(i == 0)] * 3
        run(tmp_path / "in" / str(i), compression, {"one": mean_task(values)}, date=i + 1)
    first, second = (build.write(tmp_path / "in", tmp_path / name, title="t") for name in ("one", "two"))
    for a, b in zip(first.files, second.files, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_many_long_answers_are_left_out_and_those_that_differ_stay(tmp_path):
    for i, compression in enumerate((FULL, snapkv())):
        values = [1.0] * 200
        values[150] = float(i == 0)
        answers = ["long " * 1000 if i else f"short {n}" for n in range(200)]
        run(tmp_path / str(i), compression, {"one": mean_task(values, answers=answers)}, date=i + 1)
    report = rows.report(*load.read(tmp_path))
    data, said = page.samples.samples(report)
    assert data["tasks"][0]["left_out"] == 160 and "one 160" in said
    assert data["tasks"][0]["docs"][0]["id"] == 150
    assert max(len(answer[0]) for doc in data["tasks"][0]["docs"] for answer in doc["answers"]) == 1500
    small, _ = page.samples.samples(report, max_bytes=20_000)
    assert len(json.dumps(small)) < 25_000 and small["tasks"][0]["docs"]


def test_without_answers_the_page_says_how_to_get_them(tmp_path):
    run(tmp_path / "in", FULL, {"one": mean_task([1.0, 0.0])}, log_samples=False)
    text = build.write(tmp_path / "in", tmp_path / "out").page.read_text(encoding="utf-8")
    assert "--log_samples" in text and 'id="task"' not in text


def test_tables_are_valid_in_every_form(folder):
    report = rows.report(*load.read(folder))
    for table in (tables.scores(report), tables.differences(report), tables.speed(report)):
        markdown = [line for line in as_markdown(table).splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown}) == 1
        latex = as_latex(table)
        lines = [line for line in latex.splitlines() if line.endswith(r"\\")]
        spans = [[int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", line)] for line in lines]
        assert {sum(n) or line.count(" & ") + 1 for n, line in zip(spans, lines, strict=True)} == {len(table.head)}
        assert not re.search(r"(?<!\\)[_#%]", latex.split(r"\begin{tabular}")[1])
    lines = as_csv(tables.scores(report)).splitlines()
    assert lines[1].startswith("full,100.0,100.0,1.0,0.01,")


def test_every_score_is_in_the_long_table(folder):
    table = tables.every_number(rows.report(*load.read(folder)))
    assert len(table.rows) == 8
    assert {len(row) for row in table.rows} == {len(table.head)}


@pytest.mark.parametrize("better", [True, False])
def test_the_pareto_front_is_what_no_other_point_beats(better):
    draw = random.Random(1)
    points = [(draw.randrange(10) / 10, draw.randrange(10) / 10) for _ in range(40)]
    sign = 1 if better else -1
    brute = {
        (x, y) for x, y in points if not any((a <= x and sign * b >= sign * y) and (a, b) != (x, y) for a, b in points)
    }
    assert set(plots.score_against_kept.pareto(points, better)) == brute
