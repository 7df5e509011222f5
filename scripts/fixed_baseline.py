"""Measures the baselines of a streamed text once: full cache, and window recompute (a fresh forward for each token).

    python scripts/fixed_baseline.py --model kv-tiny --dataset files --text-files book.txt --max-eval-tokens 2000 \\
        --n-sink 4 --window-size 252 --runs 3

Writes results/baselines/<dataset>_<tokens>_<key>.json, which scripts/streaming_eval.py finds again by model, weights,
text, tokens, window, dtype and device. n_sink only lengthens the recompute window: there are no sinks in it. Times are
of single steps, averaged over --runs; perplexities do not change from run to run. The last line is one JSON document
(without the per-token numbers, which are in the file).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import baselines


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """What is scored, and by which model."""
    parser.add_argument("--model", "--model-name", dest="model", required=True, help="hub name, folder, or kv-tiny")
    parser.add_argument("--dtype", default="auto", help="float32, float16, bfloat16; auto: as the weights are")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--dataset", "--dataset-name", dest="dataset", choices=("wikitext", "pg19", "files"))
    parser.add_argument("--dataset-config", default="wikitext-2-raw-v1", help="of wikitext")
    parser.add_argument("--text-files", nargs="+", help="text files or folders; makes --dataset files the default")
    parser.add_argument("--data-dir", help="folder with wikitext's or PG19's files, instead of the hub")
    parser.add_argument("--max-samples", type=int, default=1, help="books or files, joined")
    parser.add_argument("--max-eval-tokens", type=int, help="default: 4096 of wikitext, 20000 of others")
    parser.add_argument("--n-sink", type=int, default=4)
    parser.add_argument("--window-size", type=int, default=2044)
    parser.add_argument("--runs", type=int, default=1, help="repetitions of the timing")
    parser.add_argument("--timed-tokens", type=int, default=128, help="decode steps timed in each run")


def load(args: argparse.Namespace) -> baselines.Setup:
    """Model and text that the flags name."""
    if min(args.runs, args.max_samples) < 1 or args.timed_tokens < 8:
        raise UserError("--runs and --max-samples must be at least 1, --timed-tokens at least 8")
    return baselines.load(
        args.model,
        args.dataset or ("files" if args.text_files else "wikitext"),
        text_files=args.text_files,
        folder=args.data_dir,
        dataset_config=args.dataset_config,
        documents=args.max_samples,
        max_eval_tokens=args.max_eval_tokens,
        dtype=args.dtype,
        device=args.device,
    )


def without_tokens(baseline: dict[str, Any]) -> dict[str, Any]:
    """A baseline less its per-token numbers."""
    part = {k: {m: v for m, v in baseline[k].items() if m != "nll"} for k in ("recompute", "full")}
    return {**baseline, **part}


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_flags(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("results/baselines"))
    args = parser.parse_args()
    try:
        setup = load(args)
        baseline = baselines.measure(setup, args.n_sink + args.window_size, args.runs, args.timed_tokens)
    except UserError as error:
        parser.error(str(error))
    file = baselines.write(baseline, args.output_dir)
    for name in ("full", "recompute"):
        one = baseline[name]
        tpot = f"{one['tpot_s'] * 1000:.2f} ms/token" if one["tpot_s"] else "not timed: the text fits the window"
        print(f"{name:<10} perplexity {one['perplexity']:.3f}   {tpot}")
    print(json.dumps({"file": str(file), **without_tokens(baseline)}))


if __name__ == "__main__":
    main()
