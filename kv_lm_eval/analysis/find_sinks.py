"""Which token is the attention sink, what does the prefix do to it, and do low key norms mean attention?

    python scripts/find_sinks.py --model smollm2-hf --text texts/*_quarter.txt
    python scripts/find_sinks.py --model qwen05-hf --text texts/*_quarter.txt --prefix none 151643 151644

For each prefix token, over the texts: perplexity of the first `--tokens` tokens; the token that the second half of the
queries looks at most, as a mean over heads and the last two thirds of the layers; the share of attention on it and on
the first four tokens; Spearman's correlation of a key's norm with the attention that it receives, as a mean over KV
heads, in --picture layer by layer. The last line is one JSON document. Attention is eager: keep the texts short.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kv_lm_eval import console, tiny
from kv_lm_eval.errors import UserError
from kv_lm_eval.experiments import baselines
from kv_lm_eval.requests.rows import text_tokens
from kv_lm_eval.tasks.perplexity import texts


def ranks(values: Tensor) -> Tensor:
    """Along the last dimension, minus their mean."""
    order = values.argsort(-1).argsort(-1).double()
    return order - order.mean(-1, keepdim=True)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, along the last dimension; ties are broken by place."""
    a, b = ranks(a), ranks(b)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


@torch.inference_mode()
def look(model: Any, ids: list[int], prefix: int | None) -> dict[str, Any]:
    """Of one text [tokens] after its prefix."""
    fed = torch.tensor([([] if prefix is None else [prefix]) + ids])
    out = model(fed, output_attentions=True, use_cache=True)
    first = fed.shape[1] - len(ids)  # the text's first token is scored where something comes before it
    log_probs = out.logits[0, :-1].log_softmax(-1).gather(1, fed[0, 1:, None])[max(0, first - 1) :, 0]
    half = fed.shape[1] // 2
    received, rho, lowest = [], [], []
    for layer, attention in zip(out.past_key_values.layers, out.attentions, strict=True):
        of_keys = attention[0, :, half:].mean(1)  # [query heads, keys], from the second half of the queries
        received.append(of_keys.mean(0))
        norms = layer.keys[0].norm(dim=-1)[:, :half]  # [KV heads, keys]
        rho.append(correlation(norms, of_keys.reshape(len(norms), -1, fed.shape[1]).mean(1)[:, :half]))
        lowest.append((norms.argmin(-1) == 0).double())
    later = torch.stack(received[len(received) // 3 :]).mean(0)
    sink = int(later.argmax())
    return {
        "nll": [-float(v) for v in log_probs],
        "sink": sink,
        "token": int(fed[0, sink]),
        "share": float(later[sink]),
        "first_four": float(later[:4].sum()),
        "norm_correlation": torch.stack(rho).mean(-1).tolist(),  # of each layer
        "negative": float((torch.stack(rho) < 0).double().mean()),
        "first_has_lowest_norm": torch.stack(lowest).mean(-1).tolist(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Looks, prints, draws; returns the exit status."""
    return console.command("find_sinks", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="find_sinks.py", description=__doc__)
    parser.add_argument("--model", default=tiny.NAME, help="hub name or folder of a causal LM (default kv-tiny)")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, UTF-8")
    parser.add_argument("--tokens", type=int, default=256, help="tokens read of each text (default 256)")
    parser.add_argument("--prefix", nargs="+", default=["none", "bos"], help="none, bos, eos or a token's number")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(argv)
    if args.tokens < 8:
        raise UserError(f"--tokens {args.tokens} must be at least 8: half of them look, the other half are looked at")
    read = [texts.read(path) for path in args.text]
    tokenizer, model = baselines.load_model(args.model, "float32", "cpu")
    model.set_attn_implementation("eager")
    prefixes = {name: prefix_token(tokenizer, name) for name in args.prefix}
    ids = [text_tokens(tokenizer, text[: 20 * args.tokens])[0][: args.tokens] for text in read]
    result = {}
    for name, prefix in prefixes.items():
        found = [look(model, one, prefix) for one in ids]
        ppl = float(np.exp(np.mean([v for one in found for v in one["nll"]])))
        result[name] = {"perplexity": ppl, "texts": [{k: v for k, v in one.items() if k != "nll"} for one in found]}
        print(words(tokenizer, prefix, ppl, found))
    if args.picture:
        draw(result, args.picture)
    print(json.dumps(result))
    return 0


def prefix_token(tokenizer: Any, name: str) -> int | None:
    """A prefix as given on the command line.

    Raises:
        UserError: no such token.
    """
    if name == "none":
        return None
    token = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}.get(name, name)
    if token is None or not str(token).isdigit() or int(token) >= len(tokenizer):
        raise UserError(f"--prefix {name} is no token here: none, bos, eos or a number below {len(tokenizer)}")
    return int(token)


def words(tokenizer: Any, prefix: int | None, perplexity: float, found: list[dict[str, Any]]) -> str:
    """What was found under one prefix, in two lines."""

    def mean(key: str) -> float:
        return float(np.mean([one[key] for one in found]))

    spelled = "nothing" if prefix is None else repr(tokenizer.decode([prefix]))
    sinks = ", ".join(f"{one['sink']} {tokenizer.decode([one['token']])!r} {one['share']:.2f}" for one in found)
    return (
        f"begins with {spelled}: perplexity {perplexity:.1f}; sink at: {sinks}\n"
        f"    first four tokens {mean('first_four'):.3f}; norm against attention {mean('norm_correlation'):+.2f}, "
        f"negative in {mean('negative'):.0%} of the KV heads; first token has the lowest norm in "
        f"{mean('first_has_lowest_norm'):.0%}"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Key norm against attention, a line a prefix: mean over texts, layer by layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 5.5), sharex=True)
    for name, found in result.items():
        for axes, key in ((upper, "norm_correlation"), (lower, "first_has_lowest_norm")):
            axes.plot(np.array([text[key] for text in found["texts"]]).mean(0), "o-", ms=3, lw=1, label=name)
    upper.axhline(0, color="black", lw=0.8)
    upper.set_ylabel("rank correlation of key norm\nand attention received")
    lower.set(
        xlabel="layer", ylabel="share of KV heads in which the\nfirst token has the lowest norm", ylim=(-0.05, 1.05)
    )
    lower.legend(title="the text begins with", loc="center right")
    for axes in (upper, lower):
        axes.grid(lw=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
