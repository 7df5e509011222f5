"""`kv-lm-eval quickstart`: the embedded model under a few methods, one table. No network, no GPU, under two minutes.

Runs the task group kv_quickstart (needles, multiple choice, streaming perplexity) for the full cache and for three
methods at one budget, each a normal lm-eval run whose results file is kept, and prints scores beside what was kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kv_lm_eval import console, harness, plugin, saving
from kv_lm_eval.methods import names

LEGEND = """\
needle, choice: share right, higher is better; bits/byte: of text streamed through the cache, lower is better;
kept: share of pairs kept when a request ends; KV KiB: keys and values held after the prefill of a needle prompt."""
TASKS = ["kv_quickstart_needle", "kv_quickstart_choice", "kv_quickstart_ppl"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the quick start and prints its table; returns the exit status."""
    finished: list[str] = []
    return console.command("quickstart", lambda: _quickstart(argv, finished), lambda: _kept(finished))


def _kept(finished: list[str]) -> str:
    return f"Finished: {', '.join(finished) or 'nothing yet'}; the same command runs all of it again."


def _quickstart(argv: Sequence[str] | None, finished: list[str]) -> int:
    parser = console.Parser(prog="kv-lm-eval quickstart", description=__doc__.split("\n\n")[0])
    parser.add_argument("--budget", type=int, default=128, help="slots kept per KV head and layer (default 128)")
    parser.add_argument(
        "--methods", default="full,snapkv,streaming_llm,window", help=f"of {', '.join(names.available())}"
    )
    parser.add_argument("--output_path", type=Path, help="folder for the results files (default: none are written)")
    parser.add_argument("--limit", type=int, default=None, help="samples per task, for a first look")
    args = parser.parse_args(argv)
    methods = [names.check(name) for name in args.methods.split(",")]
    if args.budget < 8:
        parser.error(f"--budget {args.budget} leaves no room for sinks and a window; take at least 8")
    harness.check_limit(args.limit)
    if args.output_path:
        saving.check_output(args.output_path)
    from kv_lm_eval.methods import base  # with torch, which mistakes above need not wait for

    rows = []
    for i, name in enumerate(methods, 1):
        print(f"[{i}/{len(methods)}] {name} ...", end=" ", flush=True)
        with console.quietly():
            rows.append(run(name, base.example(name, args.budget), args.output_path, args.limit))
        finished.append(name)
        print(f"{rows[-1]['seconds']} s", flush=True)
    print(f"\nkv-tiny on kv_quickstart, budget {args.budget} slots per KV head and layer\n")
    print(console.table(rows))
    print(f"\n{LEGEND}")
    if args.output_path:
        print(f"results: {args.output_path}")
    return 0


def run(name: str, model_args: dict[str, Any], output_path: Path | None, limit: int | None) -> dict[str, Any]:
    """One method through lm-eval; a row of the table."""
    start = time.perf_counter()
    done = harness.run(
        plugin.MODEL_NAME,
        {"pretrained": "kv-tiny", "dtype": "float32", **model_args},
        TASKS,
        output_path=output_path / Path(name).stem if output_path else None,
        batch_size=8,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
    )
    assert done is not None, "the quick start is one process"
    return row(name, done.results, time.perf_counter() - start)


def row(name: str, results: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The quick start's numbers out of an lm-eval results dictionary."""
    scores = results["results"]
    stats = results["config"]["kv_stats"]
    needle = stats["by_task"]["kv_quickstart_needle"]
    return {
        "method": name,
        "needle": _metric(scores["kv_quickstart_needle"], "exact_match"),
        "choice": _metric(scores["kv_quickstart_choice"], "acc"),
        "bits/byte": _metric(scores["kv_quickstart_ppl"], "bits_per_byte", 3),
        "compressed": f"{stats['compressed_share']:.0%}",
        "kept": f"{stats['kept_fraction_mean']:.0%}",
        "KV KiB": f"{needle['kv_bytes_prefill_mean'] / 1024:.0f}",
        "seconds": f"{seconds:.1f}",
    }


def _metric(task: dict[str, Any], name: str, digits: int = 2) -> str:
    value = next(v for k, v in task.items() if k.split(",")[0] == name)
    return f"{value:.{digits}f}"
