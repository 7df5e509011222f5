"""Measures kv-tiny under every method and budget, and writes the table into its model card.

Why: the embedded model is only worth something if compression really costs it something, and if methods differ on it.

Usage:
    python scripts/tiny_card.py [--budgets 64 128 256] [--methods ...] [--card kv_lm_eval/tiny/README.md]

Output: the table on stdout and between the markers <!-- card --> and <!-- /card --> of the card; one JSON document as
the last line. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kv_lm_eval.quickstart import METHODS, quietly, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--card", type=Path, default=Path("kv_lm_eval/tiny/README.md"))
    args = parser.parse_args()
    rows = []
    for method in args.methods:
        for budget in [None] if method == "full" else args.budgets:
            with quietly():
                row = run(method, METHODS[method](budget or 0), None, None)
            rows.append(
                {"method": method, "budget": budget or "all", **{k: v for k, v in row.items() if k != "method"}}
            )
            print(rows[-1], flush=True)
    heads = [h for h in rows[0] if h != "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(str(r[h]) for h in heads) + " |" for r in rows]
    table = "\n".join(lines)
    print(table)
    text = args.card.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- card -->")
    _, _, after = rest.partition("<!-- /card -->")
    args.card.write_text(f"{before}<!-- card -->\n{table}\n<!-- /card -->{after}", encoding="utf-8")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
