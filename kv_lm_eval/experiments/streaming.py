"""StreamingLLM with lazy pruning on one long text: perplexity, time a token, memory, against both baselines.

    python scripts/streaming_eval.py --model kv-tiny --text-files book.txt --max-eval-tokens 2000 \\
        --n-sink 4 --window-size 252 --compress-every 16 --output out.json

Protocol prefill_then_stream: the first sinks + window tokens are one forward, then token by token. Perplexities cover
all tokens and, apart, those after the first eviction. Times are of single decode steps with the pruning inside the
clock, from a full window on; the full cache's are taken at four lengths spread over the text: they grow with it.

--streaming-mode mit is the published cache; ours adds lazy pruning (--compress-every), partial prunes (--cache-slack,
--max-drop), --overlap, and a window derived from the most slots ever held (--total-budget). Baselines are read from
--fixed-baseline-dir if one with the same key is there, and measured and kept there if not; --baseline-results names a
file, which is refused if it belongs to another configuration. --nll-dir writes per-token files for compare_nll.py.

Prints a table; the last line is one JSON document, also written to --output. Intervals are over blocks of neighbouring
tokens (--block), and speak of this text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kv_lm_eval import console, files
from kv_lm_eval.experiments import baselines
from kv_lm_eval.experiments.fixed_baseline import without_tokens
from kv_lm_eval.experiments.text_flags import LINE_ENDS, add_block_flag, add_text_flags, check_output_file, load
from kv_lm_eval.metrics.paired import difference


def add_streaming_flags(parser: argparse.ArgumentParser) -> None:
    """The method's settings, as in --model_args."""
    parser.add_argument("--streaming-mode", choices=("ours", "mit"), default="ours")
    parser.add_argument("--compress-every", type=int, help="tokens between two prunes; default 4, 1 for mit")
    parser.add_argument("--cache-slack", type=int, default=0)
    parser.add_argument("--max-drop", type=int, default=0)
    parser.add_argument("--overlap", type=int, default=0)
    parser.add_argument("--total-budget", "--cap-total", dest="total_budget", type=int, help="instead of --window-size")
    parser.add_argument("--refresh-budget", type=int, default=0)
    parser.add_argument("--refresh-policy", default="none")


def streaming_settings(args: argparse.Namespace) -> dict[str, Any]:
    """--model_args of the method that the flags name."""
    every = args.compress_every or (1 if args.streaming_mode == "mit" else 4)
    settings: dict[str, Any] = {"method": "streaming_llm", "mode": args.streaming_mode, "compress_every": every}
    settings["n_sink"] = args.n_sink
    if args.total_budget is None:
        settings["window_size"] = args.window_size
    for name in ("cache_slack", "max_drop", "overlap", "refresh_budget", "total_budget"):
        if getattr(args, name):
            settings[name] = getattr(args, name)
    if args.refresh_policy != "none":
        settings["refresh_policy"] = args.refresh_policy
    return settings


def stream(setup: baselines.Setup, settings: dict[str, Any], runs: int, timed: int) -> dict[str, Any]:
    """The method on the text: quality of every token, times of some."""
    compression, new_cache = baselines.compressed(setup, **settings)
    prefill = compression.method.own_capacity
    assert prefill is not None
    every = compression.schedule.compress_every
    document = baselines.quality(setup, new_cache, every, prefill)
    seconds: list[float] = []
    kv_bytes = 0
    for _ in range(runs):
        if prefill + 2 < len(setup.prompt):
            of_run, kv_bytes = baselines.decode_times(setup, new_cache, [prefill], timed)
            seconds += of_run
    cuts = document.evictions
    first = cuts[0][0] if cuts else None
    late = document.log_probs[first:] if cuts else document.log_probs[:0]
    peak = int(document.slots.max())
    return {
        "settings": compression.settings(),
        "protocol": "prefill_then_stream",
        "prefill_tokens": prefill,
        "tokens": len(document.log_probs),
        "perplexity": baselines.perplexity_of(document.log_probs),
        "tokens_after_first_eviction": len(late),
        "perplexity_after_first_eviction": baselines.perplexity_of(late),
        "next_token_accuracy": document.greedy.float().mean().item(),
        "prunes": len(cuts),
        "peak_slots": peak,
        "beyond_trained_length": baselines.beyond_trained_length(setup, peak),
        "kv_bytes_peak": kv_bytes,
        **baselines.summary_of_times(seconds),
        "first_eviction": first,
        "nll": baselines.rounded(document.log_probs),
    }


def against(streaming: dict[str, Any], baseline: dict[str, Any], block: int | None = None) -> dict[str, Any]:
    """What the method costs and gains relative to one baseline, over the same tokens."""
    delta = np.array(streaming["nll"]) - np.array(baseline["nll"])
    out: dict[str, Any] = {}
    for name, part in (
        ("all", delta),
        ("after_first_eviction", delta[len(delta) - streaming["tokens_after_first_eviction"] :]),
    ):
        found = difference([part], block)
        out[f"ppl_increase_percent_{name}"] = {
            "mean": found["ppl_change_percent"],
            "low": found["ppl_change_low_percent"],
            "high": found["ppl_change_high_percent"],
            **{k: found[k] for k in ("units", "block_tokens", "reason")},
        }
    both = streaming["tpot_s"], baseline["tpot_s"]
    out["speedup"] = both[1] / both[0] if None not in both else None
    return out


def find_baseline(args: argparse.Namespace, setup: baselines.Setup, length: int) -> dict[str, Any]:
    """From the named file, from the folder, or measured now."""
    key = setup.key(length)
    if args.baseline_results:
        return baselines.read(args.baseline_results, key)
    file = baselines.path_of(key, args.fixed_baseline_dir)
    if file.is_file():
        return baselines.read(file, key)
    baseline = baselines.measure(setup, length, args.runs, args.timed_tokens)
    baselines.write(baseline, args.fixed_baseline_dir)
    return baseline


def write_nll(folder: Path, setup: baselines.Setup, name: str, result: dict[str, Any], prefill: int) -> None:
    """One per-token file, as metrics/paired.py reads it."""
    record = {
        "document": setup.text,
        "reading": {"protocol": "prefill_then_stream", "prefill_tokens": prefill},
        "model": setup.name,
        "settings": result.get("settings", {"method": name}),
        "tokens": setup.row[1:],
        "nll": result["nll"],
        "first_eviction": result.get("first_eviction"),
    }
    files.write_json(folder / f"{name}.jsonl", record, indent=None)


def line(name: str, result: dict[str, Any], compared: dict[str, Any] | None = None) -> str:
    """One row of the table."""
    tpot = "N/A" if result["tpot_s"] is None else f"{result['tpot_s'] * 1000:.2f}"
    cells = f"{name:<12} {result['perplexity']:>11.3f} {tpot:>10} {result.get('peak_slots', 'N/A'):>7}"
    if compared is None:
        return cells
    change = compared["ppl_increase_percent_all"]
    interval = (
        f"no interval: {change['reason']}"
        if change["low"] is None
        else f"{change['low']:+.2f} .. {change['high']:+.2f}"
    )
    speed = "N/A" if compared["speedup"] is None else f"{compared['speedup']:.2f} x"
    return f"{cells}   streaming against it: perplexity {change['mean']:+.2f} % ({interval}), speed {speed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Baselines, the method, the table; returns the exit status."""
    return console.command("streaming_eval", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="streaming_eval.py", description=__doc__)
    add_text_flags(parser)
    add_streaming_flags(parser)
    add_block_flag(parser)
    parser.add_argument("--mode", choices=("both", "baseline", "streaming"), default="both")
    parser.add_argument("--fixed-baseline-dir", type=Path, default=Path("results/baselines"))
    parser.add_argument("--baseline-results", type=Path, help="a baseline's file, instead of looking for it")
    parser.add_argument("--nll-dir", type=Path, help="folder for per-token files")
    parser.add_argument("--output", "--output-file", dest="output", type=Path)
    args = parser.parse_args(argv)
    check_output_file(args.output, "--output")
    if args.mode != "streaming" and not args.baseline_results:
        files.check_folder(args.fixed_baseline_dir, "--fixed-baseline-dir")
    if args.nll_dir:
        files.check_folder(args.nll_dir, "--nll-dir")
    report = run(args)
    if args.output:
        files.write_json(args.output, report)
    print(json.dumps(report))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the flags ask for, printed and returned."""
    setup, settings = load(args), streaming_settings(args)
    length = baselines.capacity(settings)
    report: dict[str, Any] = {"key": setup.key(length), "line_ends": LINE_ENDS}
    print(f"{'':<12} {'perplexity':>11} {'ms/token':>10} {'slots':>7}")
    if args.mode != "streaming":
        baseline = find_baseline(args, setup, length)
        report["baseline"] = {k: v for k, v in without_tokens(baseline).items() if k != "key"}
    if args.mode == "baseline":
        for name in ("full", "recompute"):
            print(line(name, baseline[name]))
        return report
    streaming = stream(setup, settings, args.runs, args.timed_tokens)
    print(line("streaming", streaming))
    if args.nll_dir:
        write_nll(args.nll_dir, setup, "streaming", streaming, length)
    if args.mode == "both":
        report["metrics"] = {name: against(streaming, baseline[name], args.block) for name in ("full", "recompute")}
        for name in ("full", "recompute"):
            print(line(name, baseline[name], report["metrics"][name]))
            if args.nll_dir:
                write_nll(args.nll_dir, setup, name, baseline[name], length)
    report["streaming"] = {k: v for k, v in streaming.items() if k != "nll"}
    return report
