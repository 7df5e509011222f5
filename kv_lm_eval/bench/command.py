"""Speed and memory of all methods on one model, through one loop, with the full cache and window recompute beside them.

    kv-lm-eval bench --random-weights tiny-26m
    kv-lm-eval bench --random-weights mistral-7b --device cuda \\
        --dtype bfloat16 --prompt 16384 --capacity 1024
    kv-lm-eval bench --pretrained kv-tiny --parts decode,prefill
    kv-lm-eval bench --random-weights tiny-26m --growth

Speed depends on shapes, not on what the weights are: --random-weights takes a known shape or a config.json and
downloads nothing. Before anything runs, the card says how many bytes a step must read and how long that takes at the
bandwidth of the device, measured by a copy unless --bandwidth-gbs gives it; the tables say how far from it each step
is. On a CPU, numbers are CPU time of this process, because others use the machine too; wall time stands beside it.

Prints the card and writes it to --output-dir (docs/bench/<model>_<device>_<date>.md); the last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_lm_eval import console, files
from kv_lm_eval.bench import shapes
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import names

if TYPE_CHECKING:  # torch takes seconds, and a mistake is told before
    from kv_lm_eval.bench.measure import Bench

PARTS = (
    *("generation", "decode", "storage", "prefill", "memory", "scoring", "fidelity"),
    *("one_prefill", "shared_prefix", "compiled", "goals"),
)
MORE = ("growth",)  # parts that take long and are asked for by name
DECODED = "full,streaming_llm,streaming_ring,snapkv,h2o"
GENERATED = "full,streaming_ring,snapkv,h2o"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return console.command("bench", lambda: _main(argv), lambda: "Times are measured together, so nothing is kept.")


def _main(argv: Sequence[str] | None) -> int:
    args = arguments().parse_args(argv)
    _check(args)
    from kv_lm_eval.bench import card

    if args.output_dir:
        files.check_folder(args.output_dir, "--output-dir")
    result = run(args, sys.argv[2:] if argv is None else argv)
    text = card.markdown(result)
    print(text)
    if args.output_dir:
        kind = ["growth"] if args.growth else []
        name = "_".join((result["name"], result["environment"]["device_type"], *kind, result["date"]))
        path = Path(args.output_dir) / (re.sub(r"[^A-Za-z0-9_.-]+", "-", name) + ".md")
        files.write_whole(path, text)
        print(f"written to {path}")
        if "growth" in result:
            from kv_lm_eval.bench import growth

            growth.draw(result["growth"], path.with_suffix(".png"))
            print(f"picture: {path.with_suffix('.png')}")
    print(json.dumps(result))
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = console.Parser(prog="kv-lm-eval bench", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--random-weights", metavar="CONFIG", help=f"{', '.join(shapes.SHAPES)}, or a config.json")
    which.add_argument("--pretrained", metavar="NAME", help="a hub name, a folder, or kv-tiny")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, help="of torch on a CPU; default torch's own choice")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are thrown away")
    parser.add_argument("--parts", default=",".join(PARTS), help="which tables, in this order; default all")
    parser.add_argument("--methods", help="of the prefill table; default all")
    parser.add_argument("--decode-methods", default=DECODED, help="of the decode table; full is always in it")
    parser.add_argument("--generate-methods", default=GENERATED, help="of the table of whole requests")
    parser.add_argument("--capacity", type=int, default=512, help="slots per KV head that methods keep")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens generated for it")
    parser.add_argument("--slots", default="512,2048,8192", help="of the decode table")
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="prompts of the memory table")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a chunk in the memory table")
    parser.add_argument("--goal-lengths", default="4096,8192", help="prompts of the table of goals")
    parser.add_argument(
        "--growth", action="store_true", help="only how time and memory grow with the prompt, and a picture of it"
    )
    parser.add_argument(
        "--growth-lengths", default="1024,2048,4096,8192,16384,32768,65536", help="prompts of the table of growth"
    )
    parser.add_argument("--document", type=int, default=2048, help="tokens of the scored document")
    parser.add_argument("--choices", default="4,10", help="continuations of one context")
    parser.add_argument("--bandwidth-gbs", type=float, help="GB/s of the device; default: measured by a copy")
    parser.add_argument("--output-dir", default="docs/bench", help='where the card goes; "" for nowhere')
    return parser


def _check(args: argparse.Namespace) -> None:
    """What can be wrong, before torch is imported."""
    if args.growth:
        args.parts = "growth"
    if unknown := [part for part in args.parts.split(",") if part not in PARTS + MORE]:
        raise UserError(f"--parts {unknown[0]} is not one of: {', '.join(PARTS + MORE)}")
    for name in ",".join((args.methods or "full", args.decode_methods, args.generate_methods)).split(","):
        names.check(name)
    for option in ("slots", "lengths", "choices", "goal-lengths", "growth-lengths"):
        console.numbers(getattr(args, option.replace("-", "_")), f"--{option}")
    if args.random_weights:
        shapes.check(args.random_weights)


def run(args: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """Everything measured, as it goes into the JSON; `given` is the command line."""
    import torch

    from kv_lm_eval.bench import card, measure, timing

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    start, device = time.perf_counter(), torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    load = shapes.random_model if args.random_weights else shapes.pretrained_model
    model = load(args.random_weights or args.pretrained, dtype, args.device)
    bytes_per_s = args.bandwidth_gbs * 1e9 if args.bandwidth_gbs else timing.bandwidth(device)
    result: dict[str, Any] = {
        "name": Path(args.random_weights or args.pretrained).name.removesuffix(".json"),
        "date": datetime.date.today().isoformat(),
        "environment": card.environment(model, device),
        "model": card.static(model, bytes_per_s),
        "bandwidth_source": "given" if args.bandwidth_gbs else "measured by a copy",
        "clock": timing.clock_of(device),
        "repeats": args.repeats,
        "warm_up": args.warm_up,
        "command": " ".join(["kv-lm-eval", "bench", *given]),
    }
    bench = measure.Bench.of(model, repeats=args.repeats, warm_up=args.warm_up, capacity=args.capacity)
    result["in_cache"] = bench.in_cache
    for part in args.parts.split(","):
        print(f"{part} ... ", end="", flush=True, file=sys.stderr)
        before = time.perf_counter()
        result[part] = measured(part, bench, args)
        print(f"{time.perf_counter() - before:.0f} s", file=sys.stderr)
    result["seconds"] = time.perf_counter() - start
    return result


def measured(part: str, bench: Bench, args: argparse.Namespace) -> Any:
    """One part's numbers."""
    from kv_lm_eval.bench import goals, growth, measure, one_prefill

    def methods(text: str) -> list[str]:
        return bench.usable(list(dict.fromkeys(["full", *text.split(",")])))

    match part:
        case "generation":
            return measure.generation(bench, methods(args.generate_methods), args.prompt, args.new_tokens)
        case "decode":
            return measure.decode(bench, methods(args.decode_methods), console.numbers(args.slots, "--slots"))
        case "storage":
            return measure.storage(bench, args.prompt)
        case "prefill":
            return measure.prefills(bench, methods(args.methods or ",".join(measure.all_methods())), args.prompt)
        case "memory":
            return measure.memory(bench, console.numbers(args.lengths, "--lengths"), args.chunk)
        case "scoring":
            return measure.scoring(bench, args.document)
        case "fidelity":
            return measure.fidelity(bench, methods(args.generate_methods), args.document)
        case "one_prefill":
            return one_prefill.compared(bench, args.prompt, 2 * args.new_tokens)
        case "shared_prefix":
            return measure.shared_prefix(bench, args.prompt // 4, console.numbers(args.choices, "--choices"))
        case "goals":
            return goals.goals(bench, console.numbers(args.goal_lengths, "--goal-lengths"))
        case "growth":
            return growth.growth(bench, console.numbers(args.growth_lengths, "--growth-lengths"), args.chunk)
    return measure.compiled(bench, args.capacity)
