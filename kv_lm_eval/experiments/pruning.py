"""Does pruning hurt right where it happens? Every token of a streamed text: nll, time, cache length, prune or not.

    python scripts/diagnose_pruning.py --model kv-tiny --text-files book.txt --max-eval-tokens 2000 \\
        --n-sink 4 --window-size 252 --compress-every 32 --output-dir out

Runs the method token by token with the pruning inside the clock, and a reference on the same tokens: the same cache
pruned at every token (--reference strict), or the full cache (--reference full). The question is then asked of the
difference, after prune events against positions without one (kv_lm_eval/metrics/spikes.py), and answered "spike",
"no spike" or "too few events". A lazily pruned cache holds most right before a prune, so that the loss after one must
besides be above that of the strict cache, which holds as many slots; whatever the reference, it is run for that.

Writes to --output-dir: tokens.csv, prune_events.json, summary.json, spikes.png, and method.jsonl and reference.jsonl
for compare_nll.py. The last line is summary.json's document.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kv_lm_eval import console, files
from kv_lm_eval.engine.stepwise import Step, steps
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import baselines
from kv_lm_eval.experiments.streaming import add_streaming_flags, streaming_settings, write_nll
from kv_lm_eval.experiments.text_flags import LINE_ENDS, add_block_flag, add_text_flags, load
from kv_lm_eval.metrics.paired import difference
from kv_lm_eval.metrics.spikes import around_events, spikes

COLUMNS = ("token_index", "nll", "reference_nll", "time_ms", "kv_len", "pruned", "dropped", "prefill")


def write_tokens(file: Path, taken: list[Step], reference: np.ndarray) -> None:
    """One row a token of the text; a token of the first forward has no time of its own."""
    out = io.StringIO()
    rows = csv.writer(out)
    rows.writerow(COLUMNS)
    for i, (step, other) in enumerate(zip(taken, reference.tolist(), strict=True)):
        time_ms = "" if step.prefill else round(step.seconds * 1000, 4)
        fixed = (round(step.nll, 6), round(other, 6), time_ms)
        rows.writerow((i, *fixed, step.slots, int(step.dropped > 0), step.dropped, int(step.prefill)))
    files.write_whole(file, out.getvalue())


def latency(taken: list[Step]) -> dict[str, Any]:
    """Times of decode steps with and without a prune; None where there is no such step."""
    decode = [s for s in taken if not s.prefill][baselines.WARM_UP :]
    pruning = [s.seconds * 1000 for s in decode if s.dropped]
    others = [s.seconds * 1000 for s in decode if not s.dropped]
    pruned, plain = (statistics.median(part) if part else None for part in (pruning, others))
    every = sorted([*pruning, *others])
    return {
        "step_p50_ms": every[len(every) // 2] if every else None,
        "step_p90_ms": every[len(every) * 9 // 10] if every else None,
        "prune_step_median_ms": pruned,
        "other_step_median_ms": plain,
        "ratio": pruned / plain if pruned is not None and plain is not None else None,
    }


def draw(file: Path, delta: np.ndarray, taken: list[Step], events: list[int], found: dict[str, Any]) -> None:
    """The nll difference and the step time around prune events."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    gap = int(np.median(np.diff(events))) if len(events) > 1 else 32
    before, after = gap // 2, max(gap // 2, found["horizon"])
    curve = around_events(delta, events, before, after)
    times = np.array([np.nan if s.prefill else s.seconds * 1000 for s in taken])
    inside = [e for e in events if e - before >= 0 and e + after < len(times)]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    top.axhline(0, color="0.6", linewidth=0.8)
    top.fill_between(curve["distance"], curve["low"], curve["high"], alpha=0.25, label="95 % interval")
    top.plot(curve["distance"], curve["mean"], label=f"mean of {len(inside)} prunes")
    top.set_ylabel("nll - reference (nats)")
    top.set_title(f"{found['verdict']}: {found['reason']}", fontsize=9, wrap=True)
    top.legend(fontsize=8)
    if inside:
        around = np.stack([times[e - before : e + after + 1] for e in inside])
        bottom.plot(curve["distance"], np.nanmedian(around, axis=0))
    bottom.set_ylabel("step time (ms, median)")
    bottom.set_xlabel("tokens from the prune (0: the token scored right before it, whose step includes it)")
    for axes in (top, bottom):
        axes.axvline(0.5, color="0.3", linestyle=":", linewidth=1)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def nll_of(setup: baselines.Setup, settings: dict[str, Any], prefill: int) -> np.ndarray:
    """Every token's nll under a reference."""
    _, new_cache = baselines.compressed(setup, **settings)
    return -baselines.quality(setup, new_cache, 1, prefill).log_probs.double().numpy()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both runs, the files, the summary."""
    setup, settings = load(args), streaming_settings(args)
    if args.max_decode_steps is not None:
        setup.row = setup.row[: baselines.capacity(settings) + args.max_decode_steps + 1]
    compression, new_cache = baselines.compressed(setup, **settings)
    prefill = baselines.capacity(settings)
    taken = [step for step, _ in steps(setup.model, new_cache, setup.row, prefill)]
    strict = {"method": "streaming_llm", "n_sink": args.n_sink, "window_size": prefill - args.n_sink}
    strict_nll = nll_of(setup, strict, prefill)
    other = {"full": {"method": "full"}, "strict": strict}[args.reference]
    reference_nll = strict_nll if args.reference == "strict" else nll_of(setup, other, 0)
    nll = np.array([step.nll for step in taken])
    delta = nll - reference_nll
    events = [step.fed - 1 for step in taken if step.dropped]
    found = spikes(delta, events, args.spike_window, args.threshold, equal=nll - strict_nll)
    whole = difference([delta[events[0] + 1 :] if events else delta[:0]], args.block)
    summary = {
        "key": setup.key(prefill),
        "settings": compression.settings(),
        "reference": other,
        "tokens": len(nll),
        "line_ends": LINE_ENDS,
        "prefill_tokens": prefill,
        "perplexity": float(np.exp(nll.mean())),
        "reference_perplexity": float(np.exp(reference_nll.mean())),
        "ppl_change_percent_after_first_prune": {
            "mean": whole["ppl_change_percent"],
            "low": whole["ppl_change_low_percent"],
            "high": whole["ppl_change_high_percent"],
            **{k: whole[k] for k in ("units", "block_tokens", "reason")},
        },
        "peak_slots": max(step.slots for step in taken),
        "spikes": found,
        "latency": latency(taken),
    }
    folder = args.output_dir
    write_tokens(folder / "tokens.csv", taken, reference_nll)
    pruned = [{"token_index": s.fed - 1, "slots_before": s.slots, "dropped": s.dropped} for s in taken if s.dropped]
    files.write_json(folder / "prune_events.json", pruned, indent=None)
    files.write_json(folder / "summary.json", summary)
    draw(folder / "spikes.png", delta, taken, events, found)
    method = {
        "settings": compression.settings(),
        "nll": np.round(nll, 6).tolist(),
        "first_eviction": events[0] + 1 if events else None,
    }
    write_nll(folder, setup, "method", method, prefill)
    write_nll(folder, setup, "reference", {"settings": other, "nll": np.round(reference_nll, 6).tolist()}, prefill)
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run, tell the verdict, print the summary; returns the exit status."""
    return console.command("diagnose_pruning", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="diagnose_pruning.py", description=__doc__)
    add_text_flags(parser)
    add_streaming_flags(parser)
    add_block_flag(parser)
    parser.add_argument("--reference", choices=("strict", "full"), default="strict")
    parser.add_argument("--spike-window", type=int, default=16, help="tokens looked at after each prune")
    parser.add_argument("--threshold", type=float, default=0.1, help="nats above which a token counts for the width")
    parser.add_argument("--max-decode-steps", type=int, help="tokens after the first forward")
    parser.add_argument("--output-dir", type=Path, default=Path("results/pruning"))
    args = parser.parse_args(argv)
    if args.spike_window < 1 or (args.max_decode_steps is not None and args.max_decode_steps < 1):
        raise UserError("--spike-window and --max-decode-steps must be at least 1")
    files.check_folder(args.output_dir, "--output-dir")
    summary = run(args)
    found, times = summary["spikes"], summary["latency"]
    print(f"{found['verdict']}: {found['reason']}")
    if times["ratio"] is not None:
        print(f"a step with a prune takes {times['ratio']:.2f} times as long as one without (medians)")
    print(change_in_words(summary["ppl_change_percent_after_first_prune"], args.reference))
    print(f"{summary['tokens']} tokens, {found['events']} prunes; tables and picture in {args.output_dir}")
    print(json.dumps(summary))
    return 0


def change_in_words(change: dict[str, Any], reference: str) -> str:
    """The perplexity after the first prune against the reference's."""
    if change["mean"] is None:
        return "nothing was pruned"
    if change["low"] is None:
        return f"perplexity against {reference}: {change['mean']:+.2f} %, no interval: {change['reason']}"
    ends = f"{change['low']:+.2f} .. {change['high']:+.2f}"
    over = f"{change['units']} blocks of {change['block_tokens']} tokens"
    return f"perplexity against {reference}: {change['mean']:+.2f} % ({ends}, over {over})"
