"""What does each attention head look at? Statistics, types, pictures, and the profile that method=head_aware reads.

Why: heads that look at the last few tokens need no more of the cache; which these are is a property of the model, found
once on some text. Attention is computed in blocks, so texts may be as long as the model allows.

Usage:
    python scripts/analyze_heads.py --model kv-tiny --text BOOK.txt [MORE.txt ...] --output_path DIR
    python scripts/analyze_heads.py --model MODEL --text BOOK.txt --output_path D --tokens 2048 --chunk 512 --no_prefix
The second line is the setting of the published analysis. Every threshold of the classifier is an argument.

Output: DIR/head_profile.json (types, confidences, windows, with all thresholds), head_statistics.json,
analysis_summary.txt, and entropy_heatmap, sink_ratio, position_preference, clustering and relative_position .png. The
last line printed is a JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from kv_lm_eval import console, files, tiny
from kv_lm_eval.analysis import head_plots
from kv_lm_eval.analysis.classifier import Thresholds, classify
from kv_lm_eval.analysis.head_statistics import HeadStatistics, measure
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.full import FULL
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import baselines
from kv_lm_eval.methods.head_profile import Head, HeadProfile
from kv_lm_eval.requests.rows import prefix_of, text_tokens
from kv_lm_eval.tasks.perplexity import texts

SHORTEST = 10  # tokens; a shorter last chunk is left out, as in the published analysis


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, measures, classifies, writes; returns the exit status."""
    return console.command("analyze_heads", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="analyze_heads.py", description=__doc__)
    parser.add_argument("--model", default=tiny.NAME, help="hub name or folder of a causal LM (default kv-tiny)")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, UTF-8")
    parser.add_argument("--output_path", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens read, shared by the files (default 16384)")
    parser.add_argument("--chunk", type=int, default=None, help="tokens read in one piece (default 2048)")
    parser.add_argument("--no_prefix", action="store_true", help="do not begin every chunk with the BOS or EOS token")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_plots", action="store_true")
    for threshold in dataclasses.fields(Thresholds):
        about = f"{threshold.metadata['help']} (default {threshold.default})"
        parser.add_argument(f"--{threshold.name}", type=type(threshold.default), default=threshold.default, help=about)
    args = parser.parse_args(argv)
    files.check_folder(args.output_path, "--output_path")
    print(json.dumps(run(args)))
    return 0


def run(args: argparse.Namespace) -> dict[str, object]:
    """One analysis; returns what the last line says."""
    limits = Thresholds(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Thresholds)})
    read = [texts.read(path) for path in args.text]
    tokenizer, model = baselines.load_model(args.model, args.dtype, args.device)
    facts = wrap(model, FULL)
    prefix = None if args.no_prefix else prefix_of(tokenizer)
    length = args.chunk or min(2048, facts.max_positions or 2048)
    if length < SHORTEST or (facts.max_positions and length > facts.max_positions):
        raise UserError(
            f"--chunk {length} must be from {SHORTEST} to the model's maximum of {facts.max_positions} tokens"
        )
    if prefix is None:
        rows = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in read]
    else:
        rows = [text_tokens(tokenizer, text, prefix)[0] for text in read]
    chunks = cut(rows, args.tokens, length, prefix)
    started = time.perf_counter()
    with tqdm(total=sum(map(len, chunks)), unit="tok", desc="reading", mininterval=1) as bar:
        stats = measure(model, facts, chunks, bar.update)
    seconds = time.perf_counter() - started
    text = {
        "tokens": sum(map(len, chunks)),
        "chunk": length,
        "prefix_token": prefix,
        "files": [path.name for path in args.text],
        "line_ends": texts.LINE_ENDS,
    }
    heads = tuple(tuple(classify(head, limits) for head in layer) for layer in stats)
    profile = HeadProfile(args.model, kv_heads(model, facts.heads), dataclasses.asdict(limits), text, heads)
    profile.save(args.output_path / "head_profile.json")
    flat = [head.to_dict() for layer in stats for head in layer]
    files.write_json(args.output_path / "head_statistics.json", {"model": args.model, "text": text, "heads": flat}, 1)
    words = summary(profile, stats)
    files.write_whole(args.output_path / "analysis_summary.txt", words)
    print(words)
    if not args.no_plots:
        title = f"{args.model}: {text['tokens']} tokens in chunks of {length}"
        head_plots.write(stats, heads, limits, args.output_path, title)
    return {
        "profile": str(args.output_path / "head_profile.json"),
        "types": profile.counts(),
        "tokens": text["tokens"],
        "seconds": round(seconds, 2),
    }


def kv_heads(model: PreTrainedModel, heads: dict[int, tuple[int, int]]) -> int:
    """KV heads of a layer; a profile describes models whose layers are all alike."""
    shapes = sorted(set(heads.values()))
    if len(shapes) > 1:
        raise UserError(f"the layers of {type(model).__name__} have different (query, KV) heads: {shapes}")
    return shapes[0][1]


def cut(texts: Sequence[Sequence[int]], tokens: int, length: int, prefix: int | None) -> list[list[int]]:
    """Chunks of `length` tokens, the prefix included, from the texts in turn, `tokens` in all."""
    start = [] if prefix is None else [prefix]
    step, share = length - len(start), -(-tokens // len(texts))
    chunks = []
    for text in texts:
        part = text[:share]
        chunks += [[*start, *part[i : i + step]] for i in range(0, len(part), step)]
    chunks = [chunk for chunk in chunks if len(chunk) >= SHORTEST]
    if not chunks:
        raise UserError(f"the texts have fewer than {SHORTEST} tokens")
    return chunks


def summary(profile: HeadProfile, stats: Sequence[Sequence[HeadStatistics]]) -> str:
    """The analysis in words and two tables."""
    every = [head for layer in stats for head in layer]
    types: list[Head] = [head for layer in profile.heads for head in layer]
    total, text = len(every), profile.text
    lines = [
        f"{profile.model}: {profile.num_layers} layers of {profile.num_heads} query heads on {profile.num_kv_heads} KV "
        f"heads, {text['tokens']} tokens of {', '.join(text['files'])} in chunks of {text['chunk']}",
        "",
        f"{'type':12}{'heads':>6}{'share':>8}{'confidence':>12}   what it looks at (mean entropy, sink, last 9, rest)",
    ]
    for kind, count in profile.counts().items():
        own = [(s, h) for s, h in zip(every, types, strict=True) if h.type == kind]
        if own:
            mean = [sum(getattr(s, name) for s, _ in own) / count for name in ("entropy", "sink", "local", "far")]
            sure = sum(h.confidence for _, h in own) / count
            numbers = f"{mean[0]:.2f} nats  {mean[1]:.2f}  {mean[2]:.2f}  {mean[3]:.2f}"
            lines.append(f"{kind:12}{count:6}{100 * count / total:7.1f}%{sure:12.2f}   {numbers}")
        else:
            lines.append(f"{kind:12}{0:6}{0:7.1f}%")
    sinks = [head.sink for head in every]
    sunk = sum(share > 0.2 for share in sinks)
    lines += [
        "",
        f"mean share on the first 4 tokens {sum(sinks) / total:.3f}; {sunk} of {total} heads over 0.2",
        "",
        f"{'head':>7}{'type':>12}{'sure':>6}{'window':>8}{'entropy':>9}{'sink':>6}{'last 9':>8}{'rest':>6}{'KL':>6}",
    ]
    for s, h in zip(every, types, strict=True):
        lines.append(
            f"{f'{s.layer}.{s.head}':>7}{h.type:>12}{h.confidence:6.2f}{h.window:8}{s.entropy:9.2f}{s.sink:6.2f}"
            f"{s.local:8.2f}{s.far:6.2f}{s.uniformity:6.2f}"
        )
    return "\n".join(lines) + "\n"
