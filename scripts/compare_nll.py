"""Is run B really worse than run A? The difference of two perplexity runs with its error.

    python scripts/compare_nll.py A.jsonl B.jsonl [--block 512] [--level 0.95]

A and B are samples_*.jsonl files of kv_ppl tasks (`--log_samples --output_path DIR`) or per-token files written by
streaming_eval.py and diagnose_pruning.py. Compared are the tokens that both runs scored; other tokens, models or
protocols are refused. The interval comes from drawing blocks of neighbouring tokens, of one document each, with
replacement. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kv_lm_eval.metrics import paired


def main() -> None:
    """Read, pair, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="the run compared with, e.g. the full cache")
    parser.add_argument("b", type=Path)
    parser.add_argument("--block", type=int, default=512, help="tokens of a block")
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--level", type=float, default=0.95)
    args = parser.parse_args()
    if args.block < 1 or args.draws < 100 or not 0 < args.level < 1:
        parser.error("--block must be at least 1, --draws at least 100, --level between 0 and 1")
    try:
        found = paired.compare(paired.read(args.a), paired.read(args.b), args.block, args.draws, args.level)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(
        f"B against A, {found['documents']} document(s), {args.level:.0%} intervals over blocks of {args.block} tokens"
    )
    print(f"{'tokens':<22} {'count':>8} {'nll B - A (nats)':>18} {'perplexity':>12}   interval")
    for name in ("all", "after_first_eviction"):
        print(row(name, found[name]))
    print(json.dumps({"a": str(args.a), "b": str(args.b), **found}))


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if found["nll_difference_nats"] is None:
        return f"{name:<22} {0:>8} {'N/A':>18}"
    interval = (
        f"{found['ppl_change_low_percent']:+.2f} % .. {found['ppl_change_high_percent']:+.2f} %"
        if found["low"] is not None
        else f"none: {found['blocks']} blocks are too few, take more text or smaller blocks"
    )
    change = f"{found['ppl_change_percent']:+.2f} %"
    return f"{name:<22} {found['tokens']:>8} {found['nll_difference_nats']:>+18.5f} {change:>12}   {interval}"


if __name__ == "__main__":
    main()
