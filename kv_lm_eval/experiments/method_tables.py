"""The tables of methods in README.md and docs/, written from the method files and measured on kv-tiny.

A list kept by hand is wrong after the next method, and a method without a number beside the full cache and a random
choice says nothing. The tables stand between <!-- methods --> and <!-- /methods -->, <!-- measured --> and
<!-- /measured --> of the pages; the one of docs/which.md is made of both. Without an option the pages are only compared
with the method files (status 1: they are not what these say). Measuring all takes half an hour on a core; rows of other
methods stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kv_lm_eval import console, files, listing, quickstart
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import which_table
from kv_lm_eval.methods import base, evicted, storage

COMMAND = "python scripts/methods_doc.py"
LIST, WHICH, MEASURED = Path("docs/methods.md"), Path("docs/which.md"), "measured"
BUDGETS = (64, 128, 256)
Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, writes or measures the tables; returns the exit status."""
    return console.command("methods_doc", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="methods_doc.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write what the method files say into the pages")
    parser.add_argument("--measure", action="store_true", help="run methods on kv-tiny first, and write their rows too")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"what to measure, of {', '.join(examples())}")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="slots per KV head and layer")
    parser.add_argument("--limit", type=int, help="samples a task, for a first look")
    parser.add_argument("--folder", type=Path, default=Path(), help="of README.md and docs (default: here)")
    args = parser.parse_args(argv)
    if args.methods and not args.measure:
        parser.error("--methods are those to --measure")
    rows = measured(args.methods or list(examples()), args.budgets, args.limit) if args.measure else []
    stale = pages(args.folder, rows)
    if args.write or args.measure:
        for page, text in stale.items():
            files.write_whole(page, text)
        print("\n".join(f"written: {page}" for page in stale) or "nothing to write: the pages are what the files say")
        if rows:
            print(json.dumps(rows))
        return 0
    if stale:
        console.say(wrong(stale))
    return int(bool(stale))


def wrong(stale: dict[Path, str]) -> str:
    """One line about pages that are not what the method files say."""
    names = ", ".join(str(page) for page in stale)
    return f"the tables of methods in {names} are not what the method files say; `{COMMAND} --write` writes them"


# ------------------------------------------------------------------------------------------------ what is measured


def examples() -> dict[str, Callable[[int], dict[str, Any]]]:
    """By its name in the table, the --model_args of every method, and of what the parts make together, at a budget."""
    with_snapkv: dict[str, dict[str, Any]] = {
        "compress_every=16": {"compress_every": 16},
    }
    of_methods = [base.load(name).presets.get("evicted", "drop") for name in base.available()]
    for name in evicted.available():
        if name not in of_methods:
            with_snapkv[f"evicted={name}"] = {"evicted": name}
    forms = [storage.load(name).example() for name in storage.available()[1:]]
    with_snapkv |= {_first_setting(form): form for form in forms}
    names = [name for name in sorted(base.available()) if not base.load(name).needs_training]
    out: dict[str, Callable[[int], dict[str, Any]]] = {name: partial(base.example, name) for name in names}
    for words, more in sorted(with_snapkv.items()):
        out[f"snapkv, {words}"] = partial(_with, "snapkv", more)
    for name in names:
        if name == "snapkv" or which_table.needs_no_question(name):
            out[f"{name}, {which_table.UNSEEN}"] = partial(_with, name, {"question_in_prompt": False})
    return out


def _first_setting(settings: dict[str, Any]) -> str:
    return "{}={}".format(*next(iter(settings.items())))


def _with(method: str, more: dict[str, Any], slots: int) -> dict[str, Any]:
    return {**base.example(method, slots), **more}


def points(names: Sequence[str], budgets: Sequence[int]) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, budget, model_args) of every row: one where there is no budget, one for each number of bits."""
    known = examples()
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--methods {unknown[0]} is not one of: {', '.join(known)}")
    out: list[tuple[str, str, dict[str, Any]]] = []
    for name in names:
        few, many = known[name](64), known[name](128)
        if few != many:
            out += [(name, str(budget), known[name](budget)) for budget in budgets]
        elif shown := _shown(few):
            out += [(name, budget, {**few, **settings}) for budget, settings in shown]
            if "nbits" in few:
                forms = [storage.load(form).example() for form in storage.available()[1:] if form not in known]
                out += [(name, _first_setting(form), {"method": name, **form}) for form in forms if "nbits" not in form]
        else:
            out.append((name, "-", few))
    return out


def _shown(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What the tables show of the form of storage that these settings ask for: in words, and as settings."""
    out: list[tuple[str, dict[str, Any]]] = []
    for field in dataclasses.fields(storage.chosen(settings)[0]):
        if field.name in settings:
            for value in field.metadata.get("shown", ()):
                words = f"{value} bit" if field.name == "nbits" else f"{field.name}={value}"
                out.append((words, {field.name: value}))
    return out


def measured(names: Sequence[str], budgets: Sequence[int], limit: int | None) -> list[Row]:
    """One row a point: scores on kv_quickstart, what was kept, and what the keys and values took."""
    rows = []
    for name, budget, model_args in points(names, budgets):
        with console.quietly():
            row = quickstart.run(name, model_args, None, limit)
        shown = {k: f"{v}" for k, v in row.items() if k not in ("method", "seconds")}
        rows.append({"method": name, "budget": budget, **shown})
        print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------------------------------------ the pages


def pages(folder: Path, new: Sequence[Row] = ()) -> dict[Path, str]:
    """The pages that are not as they should be, with the text they should have.

    Args:
        folder: of README.md and docs/. new: rows measured just now, which replace those of the same method and budget.
    """
    readme, page, choice = folder / "README.md", folder / LIST, folder / WHICH
    texts = {p: files.read_text(p) for p in (readme, page, choice)}
    wanted = {readme: _with_part(texts[readme], readme, "methods", listing.short_table())}
    with_lists = _with_part(texts[page], page, "methods", listing.markdown())
    with_lists = _with_part(with_lists, page, "treatments", listing.treatments())
    with_lists = _with_part(with_lists, page, "storages", listing.storages())
    rows = _rows(_part(texts[page], page, MEASURED)[1])
    measured = _measured_part(rows, new)
    wanted[page] = _with_part(with_lists, page, MEASURED, measured)
    wanted[choice] = _with_part(texts[choice], choice, "which", which_table.text(_needles(_rows(measured)), folder))
    return {p: text for p, text in wanted.items() if text != texts[p]}


def _part(text: str, page: Path, name: str) -> tuple[str, str, str]:
    """What stands before, between and after <!-- name --> and <!-- /name -->."""
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    inside, end, after = rest.partition(f"<!-- /{name} -->")
    if not (start and end):
        raise UserError(f"{page} has no <!-- {name} --> ... <!-- /{name} --> to write into")
    return before + start, inside, end + after


def _with_part(text: str, page: Path, name: str, inside: str) -> str:
    before, _, after = _part(text, page, name)
    return f"{before}{inside}\n{after}"


def _rows(table: str) -> list[Row]:
    lines = [line.strip("| \n").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def _needles(rows: Sequence[Row]) -> dict[str, str]:
    """By name in the table, the needles that its example found at SLOTS, where it was measured."""
    found = {(row["method"], row["budget"]): row["needle"] for row in rows}
    known, out = examples(), {}
    for name, budget, settings in points(list(known), [which_table.SLOTS]):
        if settings == known[name](which_table.SLOTS) and (name, budget) in found:
            out[name] = found[name, budget]
    return out


def _measured_part(old: Sequence[Row], new: Sequence[Row]) -> str:
    """The table of what was measured, then and now, of methods that there are, and which were not."""
    by_point = {(row["method"], row["budget"]): row for row in [*old, *new]}
    names = list(examples())
    rows = [row for row in by_point.values() if row["method"] in names]
    rows.sort(key=lambda row: (names.index(row["method"]), len(row["budget"]), row["budget"]))
    text = listing.table(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""
    if trained := sorted(set(base.available()) - set(names)):
        listed = ", ".join(f"`{name}`" for name in trained)
        text += f"\n\nNot measured here, since it needs weights that were trained for the model: {listed}."
    if missing := [name for name in names if name not in {row["method"] for row in rows}]:
        listed = ", ".join(f"`{name}`" for name in missing)
        text += f"\n\nNot measured yet: {listed} (`{COMMAND} --measure --methods {shlex.quote(missing[0])}`)."
    return text
