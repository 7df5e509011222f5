"""What a run will hold in memory, before it, and the largest batch that fits.

    kv-lm-eval plan meta-llama/Llama-3.1-8B --memory 80GB \\
        --methods full snapkv,max_capacity_prompt=1024
    kv-lm-eval plan llama-3.1-8b --lengths 32768,131072 --prefill_chunk 4096

MODEL is a folder, a config.json, a hub name, kv-tiny or a known shape: no weights are read. The model's code and the
method's run on tensors without numbers, and what these would take is counted; so it holds for any model and any method.
Not counted: what a kernel takes inside one operation, the device's context, and what its allocator keeps.

Prints a table for each method, in GB of 10^9 bytes; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kv_lm_eval import console, tiny
from kv_lm_eval.bench import shapes
from kv_lm_eval.errors import UserError

if TYPE_CHECKING:  # torch takes seconds, and a mistake is told before
    from transformers import PretrainedConfig

    from kv_lm_eval.bench.estimate import Estimate

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return console.command("plan", lambda: _main(argv))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = console.Parser(prog="kv-lm-eval plan", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=f"folder, config.json, hub name or {', '.join(shapes.SHAPES)}")
    parser.add_argument(
        "--methods", nargs="+", default=["full"], metavar="NAME,KEY=VALUE", help="as in --model_args; default full"
    )
    parser.add_argument("--lengths", default="4096,32768,131072", help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens of an answer (default 128)")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts at a time (default 1)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--memory", help="of the device, as 80GB or 24GiB: the largest batch that fits")
    return parser


def _main(argv: Sequence[str] | None) -> int:
    args = arguments().parse_args(argv)
    lengths, memory = console.numbers(args.lengths, "--lengths"), size(args.memory) if args.memory else None
    for name, number in (
        ("--lengths", min(lengths)),
        ("--new_tokens", args.new_tokens),
        ("--batch_size", args.batch_size),
    ):
        if number < 1:
            raise UserError(f"{name} {number} must be at least 1")
    found = run(args, lengths, memory)
    print(table(found))
    print(json.dumps(found))
    return 0


def size(text: str) -> int:
    """Bytes that are written as 80GB (10^9 each), 24GiB (2^30 each) or a plain number.

    Raises:
        UserError: something else.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?) *([kmgt]i?)?b?", text.strip().lower())
    if not match or float(match[1]) <= 0:
        raise UserError(f"--memory {text} is no amount of memory: write it as 80GB (10^9 bytes each) or 24GiB (2^30)")
    return int(float(match[1]) * UNITS[match[2] or ""])


def run(args: argparse.Namespace, lengths: Sequence[int], memory: int | None) -> dict[str, Any]:
    """Everything that is estimated, as it goes into the JSON."""
    from lm_eval.utils import simple_parse_args_string

    from kv_lm_eval import config

    asked = {}
    for words in args.methods:
        compression, engine, rest = config.parse(simple_parse_args_string(f"method={words}"), pass_through=set())
        if rest:
            raise UserError(f"{next(iter(rest))} in --methods {words}: a method and its settings are what it takes")
        if engine.prefill_evict is not None:
            raise UserError(
                f"--methods {words}: prefill_evict is not planned; a prompt then holds its budget and a chunk"
            )
        if compression.method.reads_again:
            raise UserError(
                f"--methods {words}: it reads the prompt a second time, which is not planned; plan full with it"
            )
        if compression.open and not compression.ranks_layers:
            raise UserError(f"--methods {words}: how much a threshold keeps is known only when the prompt is read")
        if not compression.method.uses_cache:
            raise UserError(f"--methods {words}: it holds no cache, so that there is nothing to plan")
        asked[words] = (compression, engine.prefill_chunk)
    import torch

    from kv_lm_eval.bench.estimate import Estimate

    model = configuration(args.model)
    dtype = getattr(model, "dtype", None) or torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    estimate = Estimate(model, dtype)
    for compression, _ in asked.values():
        compression.check_model(estimate.facts)
    return {
        "model": args.model,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": estimate.weights,
        "layers": estimate.facts.num_layers,
        "batch_size": args.batch_size,
        "new_tokens": args.new_tokens,
        "memory": memory,
        "methods": {
            words: [
                _row(estimate, functools.partial(estimate.of, compression), n, args, memory, chunk) for n in lengths
            ]
            for words, (compression, chunk) in asked.items()
        },
    }


def _row(
    estimate: Estimate, of: Any, tokens: int, args: argparse.Namespace, memory: int | None, chunk: int | None
) -> dict[str, Any]:
    """One length under one method."""

    @functools.cache
    def batch(rows: int) -> Any:
        return of(rows, tokens, args.new_tokens, chunk)

    held = batch(args.batch_size)
    row = {"tokens": tokens, "prefill": held.prefill, "cache": held.cache, "answer": held.answer, "most": held.most}
    return row if memory is None else {**row, "largest_batch": estimate.largest(memory, batch)}


def configuration(name: str) -> PretrainedConfig:
    """Of a folder, a config.json, a known shape or a hub name.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoConfig

    if name in shapes.SHAPES or Path(name).expanduser().is_file():
        return shapes.configuration(name)
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(tiny.resolve(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is no folder with a config.json, no such file, no known shape ({', '.join(shapes.SHAPES)}) and no "
            f"hub name that can be read: {reason}"
        ) from error
    return found


def table(found: dict[str, Any]) -> str:
    """The methods one below the other, each with its lengths."""
    rows = "prompt" if found["batch_size"] == 1 else f"{found['batch_size']} prompts"
    lines = [
        f"{found['model']}: weights {gigabytes(found['weights'])} GB in {found['dtype']}, {found['layers']} layers. "
        f"In GB for {rows} at a time:"
    ]
    for method, numbers in found["methods"].items():
        shown = []
        for row in numbers:
            cells = {"tokens": f"{row['tokens']:,}"}
            cells |= {"reading": gigabytes(row["prefill"]), "cache": gigabytes(row["cache"])}
            cells |= {"answering": gigabytes(row["answer"]), "with weights": gigabytes(row["most"])}
            if found["memory"] is not None:
                cells[f"batch in {gigabytes(found['memory'])} GB"] = f"{row['largest_batch']:,}" or "-"
            shown.append(cells)
        lines += ["", method, *(f"  {line}" for line in console.table(shown).splitlines())]
    lines += ["", "reading: most while prompts are read, above the weights; cache: after the cut; answering: most"]
    lines += [f"while {found['new_tokens']} tokens are written. Without what kernels take inside one operation."]
    return "\n".join(lines)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}" if count >= 10**8 else f"{count / 1e9:.4f}"
