"""Does pruning hurt right where it happens? Every token of a streamed text: nll, time, cache length, prune or not.

    python scripts/diagnose_pruning.py --model kv-tiny --text-files book.txt --max-eval-tokens 2000 \\
        --n-sink 4 --window-size 252 --compress-every 32 --output-dir out

Runs the method token by token with the pruning inside the clock, and a reference on the same tokens: the same cache
pruned at every token (--reference strict), or the full cache (--reference full). The question is then asked of the
difference, after prune events against positions without one (kv_lm_eval/metrics/spikes.py), and answered "spike",
"no spike" or "too few events".

Writes to --output-dir: tokens.csv, prune_events.json, summary.json, spikes.png, and method.jsonl and reference.jsonl
for compare_nll.py. The last line is summary.json's document.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from fixed_baseline import add_text_flags, load
from streaming_eval import add_streaming_flags, streaming_settings, write_nll

from kv_lm_eval.engine.stepwise import Step, steps
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import baselines
from kv_lm_eval.metrics.perplexity import block_bootstrap, percent
from kv_lm_eval.metrics.spikes import around_events, spikes

COLUMNS = ("token_index", "nll", "reference_nll", "time_ms", "kv_len", "pruned", "dropped", "prefill")


def write_tokens(file: Path, taken: list[Step], reference: np.ndarray) -> None:
    """One row a token of the text; a token of the first forward has no time of its own."""
    with file.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(COLUMNS)
        for i, (step, other) in enumerate(zip(taken, reference.tolist(), strict=True)):
            time_ms = "" if step.prefill else round(step.seconds * 1000, 4)
            fixed = (round(step.nll, 6), round(other, 6), time_ms)
            rows.writerow((i, *fixed, step.slots, int(step.dropped > 0), step.dropped, int(step.prefill)))


def latency(taken: list[Step]) -> dict[str, Any]:
    """Times of decode steps with and without a prune; None where there is no such step."""
    decode = [s for s in taken if not s.prefill][baselines.WARM_UP :]
    pruning = [s.seconds * 1000 for s in decode if s.dropped]
    others = [s.seconds * 1000 for s in decode if not s.dropped]
    medians = [statistics.median(part) if part else None for part in (pruning, others)]
    every = sorted([*pruning, *others])
    return {
        "step_p50_ms": every[len(every) // 2] if every else None,
        "step_p90_ms": every[len(every) * 9 // 10] if every else None,
        "prune_step_median_ms": medians[0],
        "other_step_median_ms": medians[1],
        "ratio": medians[0] / medians[1] if None not in medians else None,
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both runs, the files, the summary."""
    setup, settings = load(args), streaming_settings(args)
    if args.max_decode_steps is not None:
        setup.row = setup.row[: baselines.capacity(settings) + args.max_decode_steps + 1]
    compression, new_cache = baselines.compressed(setup, **settings)
    prefill = baselines.capacity(settings)
    taken = [step for step, _ in steps(setup.model, new_cache, setup.row, prefill)]
    strict = {"method": "streaming_llm", "n_sink": args.n_sink, "window_size": prefill - args.n_sink}
    other = {"full": {"method": "full"}, "strict": strict}[args.reference]
    _, reference_cache = baselines.compressed(setup, **other)
    reference = baselines.quality(setup, reference_cache, 1, prefill if args.reference == "strict" else 0)
    reference_nll = -reference.log_probs.double().numpy()
    nll = np.array([step.nll for step in taken])
    delta = nll - reference_nll
    events = [step.fed - 1 for step in taken if step.dropped]
    found = spikes(delta, events, args.spike_window, args.threshold)
    whole = block_bootstrap([delta[events[0] + 1 :] if events else delta[:0]])
    summary = {
        "key": setup.key(prefill),
        "settings": compression.settings(),
        "reference": other,
        "tokens": len(nll),
        "prefill_tokens": prefill,
        "perplexity": float(np.exp(nll.mean())),
        "reference_perplexity": float(np.exp(reference_nll.mean())),
        "ppl_change_percent_after_first_prune": {k: percent(whole[k]) for k in ("mean", "low", "high")},
        "peak_slots": max(step.slots for step in taken),
        "spikes": found,
        "latency": latency(taken),
    }
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_tokens(folder / "tokens.csv", taken, reference_nll)
    pruned = [{"token_index": s.fed - 1, "slots_before": s.slots, "dropped": s.dropped} for s in taken if s.dropped]
    (folder / "prune_events.json").write_text(json.dumps(pruned) + "\n", encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(folder / "spikes.png", delta, taken, events, found)
    method = {
        "settings": compression.settings(),
        "nll": np.round(nll, 6).tolist(),
        "first_eviction": events[0] + 1 if events else None,
    }
    write_nll(folder, setup, "method", method, prefill)
    write_nll(folder, setup, "reference", {"settings": other, "nll": np.round(reference_nll, 6).tolist()}, prefill)
    return summary


def main() -> None:
    """Run, tell the verdict, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_flags(parser)
    add_streaming_flags(parser)
    parser.add_argument("--reference", choices=("strict", "full"), default="strict")
    parser.add_argument("--spike-window", type=int, default=16, help="tokens looked at after each prune")
    parser.add_argument("--threshold", type=float, default=0.1, help="nats above which a token counts for the width")
    parser.add_argument("--max-decode-steps", type=int, help="tokens after the first forward")
    parser.add_argument("--output-dir", type=Path, default=Path("results/pruning"))
    args = parser.parse_args()
    if args.spike_window < 1 or (args.max_decode_steps or 1) < 1:
        parser.error("--spike-window and --max-decode-steps must be at least 1")
    try:
        summary = run(args)
    except UserError as error:
        parser.error(str(error))
    found, times = summary["spikes"], summary["latency"]
    print(f"{found['verdict']}: {found['reason']}")
    if times["ratio"] is not None:
        print(f"a step with a prune takes {times['ratio']:.2f} times as long as one without (medians)")
    print(f"{summary['tokens']} tokens, {found['events']} prunes; tables and picture in {args.output_dir}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
