"""Where the time of a method goes: torch.profiler over prefill, cut and decode, and the operators that take most.

    python scripts/profiling.py --random-weights tiny-26m --method snapkv --max-capacity-prompt 512
    python scripts/profiling.py --pretrained kv-tiny --method streaming_llm --set window_size=252 --trace trace.json

The split is by marks in the code: "prefill" and "decode" are the forwards without their cuts, "cut" is scoring,
choosing and gathering, in both. --trace writes a Chrome trace (open it in chrome://tracing or ui.perfetto.dev).
Operator times include the profiler's own cost, which is large for small operators: `kv-lm-eval bench` says how long
things take.

Prints the split and the table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kv_lm_eval import config, console
from kv_lm_eval.bench import card, shapes
from kv_lm_eval.bench.timing import synchronise
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.prefill import feed, prefill
from kv_lm_eval.errors import UserError

MARKS = ("prefill with its cuts", "decode with its cuts", "cut in prefill", "cut in decode")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return console.command("profiling", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    print(json.dumps(run(arguments().parse_args(argv))))
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = console.Parser(prog="profiling.py", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--random-weights", metavar="CONFIG", help=f"{', '.join(shapes.SHAPES)}, or a config.json")
    which.add_argument("--pretrained", metavar="NAME", help="a hub name, a folder, or kv-tiny")
    parser.add_argument("--method", default="snapkv")
    parser.add_argument("--max-capacity-prompt", type=int, help="the method's budget in slots")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other of --model_args")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="decode steps")
    parser.add_argument("--rows", type=int, default=15, help="operators in the table")
    parser.add_argument("--trace", help="where a Chrome trace goes")
    return parser


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Profiles one request after another of the same shape that warms up; prints the tables."""
    if args.threads:
        torch.set_num_threads(args.threads)
    settings: dict[str, Any] = {"method": args.method}
    if args.max_capacity_prompt is not None:
        settings["max_capacity_prompt"] = args.max_capacity_prompt
    for text in args.set:
        name, _, value = text.partition("=")
        settings[name] = value
    compression, engine, rest = config.parse(settings, pass_through=set())
    assert not rest
    if not compression.method.uses_cache:
        raise UserError(f"method={args.method} has no cache: there is nothing to cut, and nothing to profile here")
    load = shapes.random_model if args.random_weights else shapes.pretrained_model
    model = load(args.random_weights or args.pretrained, getattr(torch, args.dtype), args.device)
    facts, device = wrap(model, compression), torch.device(args.device)
    vocab = model.config.get_text_config().vocab_size
    row = torch.randint(vocab, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    evict = engine.prefill_evict
    new_cache = partial(make_cache, compression, facts, evict or engine.prefill_chunk, evict is not None)

    def request() -> CompressedCache:
        where = ["prefill"]

        def marked() -> CompressedCache:
            cache = new_cache()
            cache.around_cut = lambda: _mark(f"cut in {where[0]}")
            return cache

        with record_function("prefill with its cuts"):
            cache, logits = prefill(model, marked, [row])
            token = int(logits[0].argmax())
            synchronise(device)
        where[0] = "decode"
        with record_function("decode with its cuts"):
            for _ in range(args.new_tokens):
                token = int(feed(model, cache, [[token]], keep=1)[0].argmax())
            synchronise(device)
        return cache

    request()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        cache = request()
    events = profiler.key_averages()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(events.table(sort_by=by, row_limit=args.rows, max_name_column_width=48))
    if args.trace:
        profiler.export_chrome_trace(args.trace)
        print(f"Chrome trace: {args.trace} (open in ui.perfetto.dev)")
    split = _split({e.key: e.cpu_time_total / 1e3 for e in events if e.key in MARKS}, args.new_tokens)
    for name, value in split.items():
        print(f"{name:24}{value:12.2f}")
    operators = [
        {"name": e.key, "calls": e.count, "self_ms": getattr(e, by) / 1e3}
        for e in sorted(events, key=lambda e: -getattr(e, by))
        if e.key not in MARKS
    ]
    return {
        "model": args.random_weights or args.pretrained,
        "settings": compression.settings(),
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "environment": card.environment(model, device),
        "kv_bytes": int(cache.snapshot()["kv_bytes_valid"][0]),
        "split": split,
        "operators": operators[: args.rows],
        "trace": args.trace,
    }


def _mark(name: str) -> AbstractContextManager[Any]:
    return record_function(name)


def _split(marks: dict[str, float], steps: int) -> dict[str, float]:
    """Milliseconds on the host, cuts taken out of what they are in."""
    cuts = [marks.get(f"cut in {where}", 0.0) for where in ("prefill", "decode")]
    prefill_ms, decode_ms = (
        marks[f"{where} with its cuts"] - cut for where, cut in zip(("prefill", "decode"), cuts, strict=True)
    )
    return {
        "prefill_ms": prefill_ms,
        "prefill_cut_ms": cuts[0],
        "decode_ms": decode_ms,
        "decode_cut_ms": cuts[1],
        "decode_step_ms": (decode_ms + cuts[1]) / max(1, steps),
    }
