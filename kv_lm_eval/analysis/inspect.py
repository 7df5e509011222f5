"""Look at one prompt under a method: a page with the tokens that each layer and head kept, and what the answer loses.

    kv-lm-eval inspect --prompt-file PROMPT.txt --output_path out \\
        --model_args pretrained=kv-tiny,method=snapkv,max_capacity_prompt=128

The prompt's text is coloured by the share of heads that kept each token; a map has the layers by position; a table the
attention mass kept, which is of the attention that the full cache's answer pays to the prompt; and each token of that
answer has its KL divergence from the full cache. The page opens without a network.

Prints a summary and writes inspect.html and inspect.json.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib.resources import files as resources
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

import numpy as np
import torch

from kv_lm_eval import config, console, files
from kv_lm_eval.analysis.kept import Kept, look
from kv_lm_eval.errors import WHICH_MODEL, UserError
from kv_lm_eval.reporting import page
from kv_lm_eval.serving.served import Served

NEW_TOKENS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit status."""
    return console.command("inspect", lambda: _main(argv), lambda: "Nothing of it is kept.")


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="kv-lm-eval inspect", description=__doc__)
    parser.add_argument("--model_args", required=True, help="pretrained=NAME,method=NAME,... as for lm-eval")
    parser.add_argument("--prompt-file", type=Path, required=True, help="a text file, UTF-8: the prompt")
    parser.add_argument("--output_path", type=Path, required=True, help="folder for the page and the numbers")
    parser.add_argument("--apply_chat_template", action="store_true", help="the text is one turn of the user's")
    parser.add_argument("--max_new_tokens", type=int, default=NEW_TOKENS, help=f"of an answer (default {NEW_TOKENS})")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
    text = files.read_text(args.prompt_file)
    if not text.strip():
        raise UserError(f"{args.prompt_file} is empty: there is no prompt to look at")
    files.check_folder(args.output_path, "--output_path")
    numbers, page = inspect(args.model_args, text, args.max_new_tokens, args.apply_chat_template)
    files.write_json(args.output_path / "inspect.json", numbers)
    files.write_whole(args.output_path / "inspect.html", page)
    print(summary(numbers))
    print(f"\npage: {args.output_path / 'inspect.html'}")
    return 0


def inspect(model_args: str, text: str, most_new: int = NEW_TOKENS, chat: bool = False) -> tuple[dict[str, Any], str]:
    """The numbers, and the page, of a prompt under the method that model_args name."""
    from lm_eval.utils import simple_parse_args_string

    from kv_lm_eval.experiments import baselines

    given = simple_parse_args_string(model_args)
    name, dtype, device = (given.pop(key, None) for key in ("pretrained", "dtype", "device"))
    if not name:
        raise UserError(WHICH_MODEL)
    compression, _, rest = config.parse(dict(given))
    if rest:
        raise UserError(f"{next(iter(rest))} in --model_args: inspect takes pretrained, dtype, device and the method")
    if not compression.method.uses_cache:
        raise UserError(f"method={compression.method.name} has no cache, so that there is nothing to look into")
    config.check_pretrained(name)
    tokenizer, model = baselines.load_model(
        name, dtype or "auto", device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    ids, pieces = tokens_of(tokenizer, text, chat)
    served = Served(model, "inspect", given, tokenizer=tokenizer)
    assert served.facts is not None
    most = served.facts.max_positions
    if len(ids) < 2 or (most is not None and len(ids) + most_new > most):
        raise UserError(
            f"the prompt has {len(ids)} tokens, and {most_new} new ones are asked for: it takes at least 2 of a prompt "
            f"and, for {name}, at most {most} of both together"
        )
    pad = next(x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if x is not None)
    found = look(served, ids, most_new, pad)
    numbers = _numbers(str(name), served, found, tokenizer, len(ids))
    return numbers, _page(numbers, found, pieces)


def tokens_of(tokenizer: Any, text: str, chat: bool) -> tuple[list[int], list[str]]:
    """A prompt's tokens and the text of each; a character that several tokens share stands with the first of them."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "--apply_chat_template: the tokenizer has no chat template, as of a base model; leave it out"
            )
        turn = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    fast = bool(tokenizer.is_fast)
    encoded = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=fast, verbose=False)
    ids = [int(i) for i in encoded["input_ids"]]
    if not fast:
        return ids, [str(tokenizer.decode([i])) for i in ids]
    pieces, at = [], 0
    for i, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True):
        pieces.append(text[min(at, begin) : end] if end > at else "" if end > begin else str(tokenizer.decode([i])))
        at = max(at, end)
    return ids, pieces


def _numbers(name: str, served: Served, found: Kept, tokenizer: Any, tokens: int) -> dict[str, Any]:
    """What inspect.json has."""
    mass = found.mass_kept()
    cut = served.facts.cut_layers if served.facts is not None else []

    def texts(answer: Sequence[int]) -> list[str]:
        return [str(tokenizer.decode([i])) for i in answer]

    return {
        "model": name,
        "settings": served.compression.settings(),
        "prompt_tokens": tokens,
        "kept_share": fmean(float(found.kept[i].float().mean()) for i in cut),
        "mass_kept": fmean(value for i in cut for value in mass[i]),
        "mass_kept_by_head": mass,
        "kept_by_head": [kept.sum(1).tolist() for kept in found.kept],
        "cut_layers": cut,
        "kv_bytes": found.report.kv_bytes,
        "kv_bytes_full": found.report.kv_bytes_full,
        "answer": texts(found.answer),
        "full_answer": texts(found.full_answer),
        "kl": [float(x) for x in found.beside.kl],
        "kl_mean": float(found.beside.kl.mean()),
        "same_top": [bool(x) for x in found.beside.same_top],
    }


def summary(numbers: dict[str, Any]) -> str:
    """For people."""
    same = sum(numbers["same_top"])
    return "\n".join(
        [
            f"{numbers['model']}, method={numbers['settings']['method']}, prompt of {numbers['prompt_tokens']} tokens",
            f"  tokens kept, mean over heads   {numbers['kept_share']:.1%}",
            f"  attention mass kept            {numbers['mass_kept']:.1%}",
            f"  KL a token of the full answer  {numbers['kl_mean']:.3g} nats, same top token {same} of "
            f"{len(numbers['kl'])}",
            f"  answer       {''.join(numbers['answer'])!r}",
            f"  full cache   {''.join(numbers['full_answer'])!r}",
        ]
    )


# ---------------------------------------------------------------------------------------------------- the page


def _page(numbers: dict[str, Any], found: Kept, pieces: Sequence[str]) -> str:
    layers = [
        {
            "heads": len(kept),
            "kept": _packed(np.packbits(kept.numpy().reshape(-1))),
            # by the root, so that small shares keep their digits
            "shares": _packed((share.sqrt() * 65535).round().numpy().astype("<u2")),
        }
        for kept, share in zip(found.kept, found.shares, strict=True)
    ]
    text = json.dumps({**numbers, "pieces": list(pieces), "layers": layers}, separators=(",", ":"))
    return Template(resources("kv_lm_eval.analysis").joinpath("inspect.html").read_text(encoding="utf-8")).substitute(
        css=page.style(), data=text.replace("<", "\\u003c")
    )


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
