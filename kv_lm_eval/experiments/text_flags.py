"""What the scripts on one streamed text have in common: its flags, and where their files go."""

from __future__ import annotations

import argparse
from pathlib import Path

from kv_lm_eval import files
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import baselines
from kv_lm_eval.tasks.perplexity.texts import LINE_ENDS

__all__ = ["LINE_ENDS", "add_block_flag", "add_text_flags", "check_output_file", "load"]


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
    if getattr(args, "block", None) is not None and args.block < 1:
        raise UserError(f"--block {args.block} must be at least 1")
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


def add_block_flag(parser: argparse.ArgumentParser) -> None:
    """Of the intervals."""
    parser.add_argument("--block", type=int, help="tokens of a block of the intervals (default: from the length)")


def check_output_file(file: Path | None, what: str) -> None:
    """Before work is done: whether a result can be written there.

    Raises:
        UserError: it is a folder, lies under a file, or cannot be written.
    """
    if file is not None and file.is_dir():
        raise UserError(f"{what}={file}: is a folder, a file was expected; give another path")
    if file is not None:
        files.check_folder(file.parent, what)
