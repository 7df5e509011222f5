"""Measures the baselines of a streamed text once: full cache, and window recompute (a fresh forward for each token).

    python scripts/fixed_baseline.py --model kv-tiny --dataset files --text-files book.txt --max-eval-tokens 2000 \\
        --n-sink 4 --window-size 252 --runs 3

Writes results/baselines/<dataset>_<tokens>_<key>.json, which scripts/streaming_eval.py finds again by model, weights,
text, tokens, window, dtype and device. n_sink only lengthens the recompute window: there are no sinks in it. Times are
of single steps, averaged over --runs; perplexities do not change from run to run. The last line is one JSON document
(without the per-token numbers, which are in the file).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kv_lm_eval import console, files
from kv_lm_eval.experiments import baselines
from kv_lm_eval.experiments.text_flags import add_text_flags, load


def without_tokens(baseline: dict[str, Any]) -> dict[str, Any]:
    """A baseline less its per-token numbers."""
    part = {k: {m: v for m, v in baseline[k].items() if m != "nll"} for k in ("recompute", "full")}
    return {**baseline, **part}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, keep, print; returns the exit status."""
    return console.command("fixed_baseline", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="fixed_baseline.py", description=__doc__)
    add_text_flags(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("results/baselines"))
    args = parser.parse_args(argv)
    files.check_folder(args.output_dir, "--output-dir")
    setup = load(args)
    baseline = baselines.measure(setup, args.n_sink + args.window_size, args.runs, args.timed_tokens)
    file = baselines.write(baseline, args.output_dir)
    for name in ("full", "recompute"):
        one = baseline[name]
        tpot = f"{one['tpot_s'] * 1000:.2f} ms/token" if one["tpot_s"] else "not timed: the text fits the window"
        print(f"{name:<10} perplexity {one['perplexity']:.3f}   {tpot}")
    print(json.dumps({"file": str(file), **without_tokens(baseline)}))
    return 0
