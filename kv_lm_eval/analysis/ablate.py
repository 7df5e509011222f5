"""Does a window by head type beat one window for all? The mask ablation of head types, with error bars.

Why: the published table (perplexity over 999 tokens of one book, no full-attention row) cannot tell its rows apart.
Here every row is scored on the same tokens and compared token by token, with an interval over the files where there are
six or more, else over blocks of neighbouring tokens: then it speaks of these files only.

Usage:
    python scripts/ablate_heads.py --model kv-tiny --profile head_profile.json --text BOOK.txt [MORE.txt ...]
    python scripts/ablate_heads.py ... --rows B_streaming:base_window=128 I_inverse:mixed_window=128 --mode cache

A row is PRESET:SETTING=VALUE,... as in --model_args of method=head_aware; default: all rows of the published table.
Every document starts with the prefix token and is scored from its first token on. mode=simulate (default) masks, which
gives the numbers of a cache cut at every token and is faster.

Output: a table (perplexity, share of tokens that are the most likely one, what a query sees and what a cache holds at
the end of a document, difference to the full cache and to --against), and one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kv_lm_eval import config, console, tiny
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.again import words_of
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.streaming import Stream, score_documents
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import baselines
from kv_lm_eval.experiments.text_flags import add_block_flag
from kv_lm_eval.methods.head_aware import UNIFORM, HeadAware
from kv_lm_eval.requests.rows import prefix_of, text_tokens
from kv_lm_eval.stats import blocks
from kv_lm_eval.tasks.perplexity import texts

PUBLISHED = [
    *(f"A_window:base_window={n}" for n in (64, 128, 256, 512)),
    *(f"B_streaming:base_window={n}" for n in (64, 128, 256, 512)),
    *(f"G_conf:confidence={c},base_window=128" for c in (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8)),
    *(f"G_conf:confidence={c},base_window=64" for c in (0.5, 0.6, 0.7)),
    *(f"I_inverse:positional_window={n}" for n in (128, 256, 512)),
    "I_inverse:positional_window=256,mixed_window=128",
    *(f"J_small_gathering:gathering_window={n}" for n in (64, 128, 256)),
    "J_small_gathering:positional_window=64",
    *(f"K_uniform:base_window={n}" for n in (64, 128)),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Scores every row and prints the table; returns the exit status."""
    return console.command("ablate_heads", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="ablate_heads.py", description=__doc__)
    parser.add_argument("--model", default=tiny.NAME, help="hub name or folder of a causal LM (default kv-tiny)")
    parser.add_argument("--profile", required=True, help="head_profile.json of scripts/analyze_heads.py")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, UTF-8, not those profiled")
    parser.add_argument("--documents", type=int, default=20, help="documents, shared by the files (default 20)")
    parser.add_argument("--length", type=int, default=999, help="tokens of a document (default 999)")
    parser.add_argument("--rows", nargs="+", default=PUBLISHED, help="PRESET:SETTING=VALUE,... (default: all)")
    parser.add_argument(
        "--against", default="B_streaming:base_window=128", help="row that the others are compared with"
    )
    add_block_flag(parser)
    parser.add_argument("--mode", choices=("simulate", "cache"), default="simulate")
    parser.add_argument("--batch_size", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(run(parser.parse_args(argv))))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rows on the same documents; prints the table and returns it."""
    if min(args.documents, args.batch_size) < 1 or args.length < 2 or (args.block is not None and args.block < 1):
        raise UserError("--documents, --batch_size and --block must be at least 1, --length at least 2")
    names = ["full", *dict.fromkeys([args.against, *args.rows])]
    settings = {name: settings_of(name, args.profile, args.mode) for name in names}
    parsed = {name: config.parse(one)[0] for name, one in settings.items()}  # mistakes show before any work
    read = [texts.read(path) for path in args.text]
    tokenizer, model = baselines.load_model(args.model, args.dtype, args.device)
    prefix = prefix_of(tokenizer)
    documents, of_file = cut(tokenizer, args.text, read, args.documents, args.length)
    scores, rows = {}, []
    with tqdm(total=len(names) * sum(map(len, documents)), unit="tok", mininterval=2) as bar:
        for name, compression in parsed.items():
            facts = wrap(model, compression)
            facts.words = words_of(tokenizer)
            new_cache = partial(make_cache, compression, facts)
            scored = []
            for start in range(0, len(documents), args.batch_size):
                batch = documents[start : start + args.batch_size]
                scored += score_documents(
                    model, new_cache, batch, Stream(prefix, 1, dtype=torch.float32), progress=bar.update
                )[0]
            scores[name] = [-one.log_probs.double().cpu().numpy() for one in scored]
            rows.append(
                row(name, scores, [one.greedy.cpu().numpy() for one in scored], compression.method, args, of_file)
            )
    text = {"files": [path.name for path in args.text], "documents": len(documents), "length": args.length}
    text["line_ends"] = texts.LINE_ENDS
    tokens = sum(map(len, documents))
    first = rows[1][f"minus {names[0]}"]
    over = f"95 % intervals over {blocks.in_words(first)}" if first["low"] is not None else first["reason"]
    print(f"{args.model}, {tokens} tokens, mode={args.mode}; differences in nats a token, {over}\n")
    print(table(rows, args.against))
    return {"model": args.model, "text": text, "mode": args.mode, "against": args.against, "rows": rows}


def settings_of(name: str, profile: str, mode: str) -> dict[str, Any]:
    """--model_args of a row; windows alike for all heads take no profile."""
    if name == "full":
        return {"method": "full"}
    preset, _, given = name.partition(":")
    pairs = [pair.partition("=") for pair in given.split(",") if pair]
    typed = {} if preset in UNIFORM else {"profile": profile}
    return {"method": "head_aware", "preset": preset, "mode": mode, **typed, **{key: value for key, _, value in pairs}}


def cut(
    tokenizer: Any, paths: Sequence[Path], read: Sequence[str], documents: int, length: int
) -> tuple[list[list[int]], list[int]]:
    """Documents of `length` tokens, the same number from every file, evenly spread over it; and the file of each."""
    share = -(-documents // len(paths))
    out, of_file = [], []
    for number, (path, text) in enumerate(zip(paths, read, strict=True)):
        ids, _ = text_tokens(tokenizer, text)
        if len(ids) < share * length:
            raise UserError(f"{path} has {len(ids)} tokens, fewer than {share} documents of {length}")
        out += [ids[i * (len(ids) // share) :][:length] for i in range(share)]
        of_file += [number] * share
    return out[:documents], of_file[:documents]


def row(
    name: str,
    scores: dict[str, Any],
    greedy: list[Any],
    method: Any,
    args: argparse.Namespace,
    of_file: Sequence[int],
) -> dict[str, Any]:
    """Everything the table says of one row."""
    nll = scores[name]
    aware = isinstance(method, HeadAware)
    out = {
        "row": name,
        "perplexity": math.exp(np.concatenate(nll).mean()),
        "accuracy": float(np.concatenate(greedy).mean()),
        "effective_context": method.effective_context(args.length) if aware else args.length,
        "cache_slots": method.cache_slots(args.length) if aware else args.length,
    }
    for other in ("full", args.against):
        if other in scores and other != name:
            delta = [a - b for a, b in zip(nll, scores[other], strict=True)]
            out[f"minus {other}"] = blocks.interval(delta, args.block, texts=of_file)
    return out


def table(rows: Sequence[dict[str, Any]], against: str) -> str:
    """Markdown."""
    others = ["full", against]
    lines = [
        "| masks | perplexity | accuracy % | query sees | cache holds | "
        + " | ".join(f"minus {o}" for o in others)
        + " |"
    ]
    lines.append("|---" * (5 + len(others)) + "|")
    for one in rows:
        cells = [one["row"], f"{one['perplexity']:.3f}", f"{100 * one['accuracy']:.2f}"]
        cells += [f"{one['effective_context']:.1f}", f"{one['cache_slots']:.1f}"]
        lines.append("| " + " | ".join(cells + [difference(one.get(f"minus {other}")) for other in others]) + " |")
    return "\n".join(lines)


def difference(found: dict[str, Any] | None) -> str:
    """A paired difference and its interval; in brackets where zero is inside it."""
    if found is None or found["mean"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:+.4f} (no interval)"
    text = f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
    return f"({text})" if found["low"] <= 0 <= found["high"] else text
