"""Writes the generated parts of docs/methods.md: the list of methods, and what each of them does to kv-tiny.

Why: a list kept by hand is wrong after the next method, and a method without a number beside the full cache and a
random choice says nothing.

Usage:
    python scripts/methods_doc.py                 # the list, from the method files
    python scripts/methods_doc.py --measure       # and the measured table, on the embedded model
    python scripts/methods_doc.py --measure --methods snapkv random --budgets 128 --page /tmp/page.md

Output: the parts between <!-- methods --> and <!-- /methods -->, and <!-- measured --> and <!-- /measured --> of the
page. With --measure the table on stdout too, and one JSON document as the last line; 10 to 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kv_lm_eval import listing
from kv_lm_eval.console import quietly
from kv_lm_eval.quickstart import METHODS, run

ONE_BUDGET = {"full", "no_cache"}  # which have none
COMPOSITIONS = {  # what the parts make together, at a budget of N slots
    "snapkv, evicted=cam": lambda n: {**METHODS["snapkv"](n), "evicted": "cam"},
    "snapkv, evicted=d2o": lambda n: {**METHODS["snapkv"](n), "evicted": "d2o"},
    "snapkv, nbits=4": lambda n: {**METHODS["snapkv"](n), "nbits": 4, "residual_length": 32},
    "snapkv, compress_every=16": lambda n: {**METHODS["snapkv"](n), "compress_every": 16},
    "snapkv, question_in_prompt=False": lambda n: {**METHODS["snapkv"](n), "question_in_prompt": False},
    "random, question_in_prompt=False": lambda n: {**METHODS["random"](n), "question_in_prompt": False},
}
BITS = (2, 4, 8)  # of `quantized`, which has no budget of slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", action="store_true", help="run every method on kv-tiny")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *COMPOSITIONS])
    parser.add_argument("--limit", type=int, default=None, help="samples a task, for a first look")
    parser.add_argument("--page", type=Path, default=Path("docs/methods.md"))
    args = parser.parse_args()
    write_part(args.page, "methods", listing.markdown())
    if args.measure:
        rows = measured(args.methods, args.budgets, args.limit)
        table = markdown(rows)
        print(table)
        write_part(args.page, "measured", table)
        print(json.dumps(rows))


def points(methods: list[str], budgets: list[int]) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, budget, model_args) of every row."""
    out: list[tuple[str, str, dict[str, Any]]] = []
    for name in methods:
        if name == "quantized":
            out += [(name, f"{bits} bit", {**METHODS[name](0), "nbits": bits}) for bits in BITS]
        elif name in ONE_BUDGET:
            out.append((name, "-", METHODS[name](0)))
        else:
            settings = METHODS.get(name) or COMPOSITIONS[name]
            out += [(name, str(budget), settings(budget)) for budget in budgets]
    return out


def measured(methods: list[str], budgets: list[int], limit: int | None) -> list[dict[str, Any]]:
    """One row a point: scores on kv_quickstart, what was kept, and what the keys and values took."""
    rows = []
    for name, budget, model_args in points(methods, budgets):
        with quietly():
            row = run(name, model_args, None, limit)
        rows.append({"method": name, "budget": budget, **{k: v for k, v in row.items() if k != "method"}})
        print(rows[-1], flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    heads = [h for h in rows[0] if h != "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(str(r[h]) for h in heads) + " |" for r in rows])


def write_part(page: Path, part: str, text: str) -> None:
    """Puts the text between <!-- part --> and <!-- /part --> of the page."""
    old = page.read_text(encoding="utf-8")
    before, start, rest = old.partition(f"<!-- {part} -->")
    _, end, after = rest.partition(f"<!-- /{part} -->")
    if not (start and end):
        raise SystemExit(f"{page} has no <!-- {part} --> ... <!-- /{part} --> to write into")
    page.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
