"""No text of a picture is cut off or stands on another's, whatever the names are and however few there are."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from results import FULL, efficiency, mean_task, perplexity_task, run, snapkv

from kv_lm_eval import fit
from kv_lm_eval.reporting import load, plots, rows
from kv_lm_eval.tasks.needle import heatmap

LONG = "kv_a_task_with_a_name_that_nobody_should_have_to_read_to_its_end_but_that_somebody_wrote"


def texts_of(figure):
    """Every text that is drawn, with its box in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in beyond(axis)}
    shown = [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in hidden
        if text.axes is None or text.axes.get_visible()
    ]
    return canvas.get_width_height(), [(text, text.get_window_extent(canvas.get_renderer())) for text in shown]


def beyond(axis):
    """Labels of ticks outside the axis, which are not drawn."""
    low, high = sorted(axis.get_view_interval())
    for tick in axis.get_major_ticks():
        if not low <= tick.get_loc() <= high:
            yield from (tick.label1, tick.label2)


def cut_off(figure, slack=1.0):
    (width, height), found = texts_of(figure)
    return [
        text.get_text()
        for text, box in found
        if box.x0 < -slack or box.y0 < -slack or box.x1 > width + slack or box.y1 > height + slack
    ]


def on_another(figure):
    """Titles and legends that touch a title of other axes."""
    _, found = texts_of(figure)
    titles = [axis.title for axis in figure.axes] + [axis._left_title for axis in figure.axes]
    titles += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [(text, box) for text, box in found if text in titles or text is figure._suptitle]
    return [
        (a.get_text(), b.get_text()) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.overlaps(two)
    ]


def folder_of(tmp_path, methods, tasks, lengths=(256, 512)):
    places = [{"context_length": n, "document_depth_percent": d} for n in lengths for d in (0, 50, 100)]
    pairs = [(-30.0 - i, 10) for i in range(6)]
    spread = {"median": 0.1, "p10": 0.05, "p90": 0.3, "n": 12}
    for i, compression in enumerate(methods):
        found = {
            name: mean_task([float(i < 2), 1.0, 0.5] * len(lengths), extra=places)
            if kind == "needle"
            else perplexity_task([(ll - i, n) for ll, n in pairs])
            for name, kind in tasks.items()
        }
        stats = {"efficiency": efficiency(ttft_s=spread, tokens_per_s=spread)}
        run(tmp_path / str(i), compression, found, date=i + 1, stats=stats)
    return tmp_path


STREAMING = [{"method": "streaming_llm", "n_sink": s, "window_size": w} for s, w in ((4, 252), (4, 124), (8, 124))]
EVERY = [snapkv(64, compress_every=n) for n in (16, 64)]
FOLDERS = {
    "one task, two methods": ([FULL, snapkv()], {"a": "needle"}),
    "many methods on one task": ([FULL, *(snapkv(i, method=f"method_{i}") for i in range(1, 14))], {"a": "needle"}),
    "long names": ([FULL, snapkv(method=LONG), *EVERY], {LONG: "needle", LONG + "_2": "needle", LONG + "_3": "ppl"}),
    "settings in pairs": ([FULL, *STREAMING, *EVERY], {"a": "needle", "b": "ppl", "c": "ppl"}),
    "one method": ([FULL], {"a": "needle"}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_no_text_is_cut_off(tmp_path, name):
    report = rows.report(*load.read(folder_of(tmp_path, *FOLDERS[name])))
    pictures = plots.all_of(report, plots.needles.panels_of(report))
    assert {"score_against_kept", "table"} < {picture.name for picture in pictures}
    for picture in pictures:
        assert not cut_off(picture.figure), picture.name
        assert not on_another(picture.figure), picture.name


@pytest.mark.parametrize(
    "panels, lengths, titles",
    [
        (1, (256,), ["", LONG]),
        (2, (256, 512), ["", LONG, "words " * 40]),
        (9, (256, 512), [""]),
        (2, tuple(range(256, 4096, 256)), [""]),
    ],
)
def test_no_text_of_a_heat_map_is_cut_off(tmp_path, panels, lengths, titles):
    methods = [FULL, *(snapkv(16 * i, a_setting_with_a_long_name=i) for i in range(1, panels))]
    report = rows.report(*load.read(folder_of(tmp_path, methods, {"kv_needle_multiquery": "needle"}, lengths)))
    found = plots.needles.panels_of(report)
    assert len(found) == panels
    for title in titles:
        figure = heatmap.draw(found, title)
        assert not cut_off(figure) and not on_another(figure)


def test_points_are_named_by_settings_not_by_bare_numbers(tmp_path):
    report = rows.report(*load.read(folder_of(tmp_path, [FULL, *STREAMING, snapkv(64), snapkv(128)], {"a": "needle"})))
    names = plots.trade_off._names_of_points(report.rows)
    assert sorted(set(names.values())) == [
        "",
        "128",
        "64",
        "n_sink=4\nwindow_size=124",
        "n_sink=4\nwindow_size=252",
        "n_sink=8\nwindow_size=124",
    ]


@pytest.mark.parametrize("text", [LONG, "a b c " * 30, "x" * 300, "", "one\ntwo three", "é" * 50, "a=b,c=d/e_f " * 9])
def test_wrapped_lines_are_as_wide_as_there_is_room_and_lose_nothing(text):
    wrapped = fit.wrap(text, 1.5, 9)
    assert all(fit.inches(line, 9) <= 1.5 for line in wrapped.split("\n"))
    assert "".join(wrapped.split()) == "".join(text.split())


def test_pictures_of_many_rows_draw_the_first_and_have_the_numbers_of_all(tmp_path, monkeypatch):
    for module in (plots.summary, plots.table):
        monkeypatch.setattr(module, "MAX_ROWS", 5)
    monkeypatch.setattr(plots.needles, "MAX_PANELS", 5)
    report = rows.report(*load.read(folder_of(tmp_path, [FULL, *(snapkv(n) for n in range(8))], {"a": "needle"})))
    found = {picture.name: picture for picture in plots.all_of(report, plots.needles.panels_of(report))}
    for name in ("summary", "table", "needle_a"):
        drawn = {" ".join(text.get_text().split()) for text, _ in texts_of(found[name].figure)[1]}
        labels = [row.label for row in report.rows]
        assert sum(any(text.startswith(label) for text in drawn) for label in labels) == 5, name
        assert {line[0] for line in found[name].numbers[1:]} == set(labels), name
        assert "The first 5 of 9" in found[name].caption
