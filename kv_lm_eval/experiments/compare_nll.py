"""Is run B really worse than run A? The difference of two perplexity runs with its error.

    python scripts/compare_nll.py A.jsonl B.jsonl [--block 512] [--level 0.95]

A and B are samples_*.jsonl files of kv_ppl tasks (`--log_samples --output_path DIR`) or per-token files written by
streaming_eval.py and diagnose_pruning.py. Compared are the tokens that both runs scored; other tokens, models or
protocols are refused. The interval takes each document for one observation, or where there are fewer than six, each
block of neighbouring tokens: then it speaks of these texts only. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kv_lm_eval import console
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics import paired
from kv_lm_eval.stats import blocks


def main(argv: Sequence[str] | None = None) -> int:
    """Read, pair, print; returns the exit status."""
    return console.command("compare_nll", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="compare_nll.py", description=__doc__)
    parser.add_argument("a", type=Path, help="the run compared with, e.g. the full cache")
    parser.add_argument("b", type=Path)
    parser.add_argument("--block", type=int, help="tokens of a block (default: from the length)")
    parser.add_argument("--level", type=float, default=0.95)
    args = parser.parse_args(argv)
    if (args.block is not None and args.block < 1) or not 0 < args.level < 1:
        raise UserError("--block must be at least 1, --level between 0 and 1")
    found = paired.compare(paired.read(args.a), paired.read(args.b), args.block, args.level)
    print(f"B against A, {found['documents']} document(s), {100 * args.level:g} % intervals")
    print(f"{'tokens':<22} {'count':>8} {'nll B - A (nats)':>18} {'perplexity':>12}   interval")
    for name in ("all", "after_first_eviction"):
        print(row(name, found[name]))
    print(json.dumps({"a": str(args.a), "b": str(args.b), **found}))
    return 0


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if found["nll_difference_nats"] is None:
        return f"{name:<22} {0:>8} {'N/A':>18}"
    if found["low"] is None:
        interval = f"none: {found['reason']}; take more text or smaller blocks"
    else:
        ends = (found["ppl_change_low_percent"], found["ppl_change_high_percent"])
        interval = "{:+.2f} % .. {:+.2f} %".format(*ends) + f" over {blocks.in_words(found)}"
    change = f"{found['ppl_change_percent']:+.2f} %"
    return f"{name:<22} {found['tokens']:>8} {found['nll_difference_nats']:>+18.5f} {change:>12}   {interval}"
