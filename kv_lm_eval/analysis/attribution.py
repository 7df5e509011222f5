"""Where the divergence from the full cache comes from: one layer, KV head or treatment compressed at a time.

    kv-lm-eval fidelity --attribute layers --text BOOK.txt --output_path out \\
        --model_args pretrained=kv-tiny,method=snapkv,max_capacity_prompt=128

Each part is compressed alone, everything else is the full cache, and the text is run beside the full cache: KL of each,
with its interval, and for layers and heads two cheap proxies, which cost no second look at the logits: how much of the
layer's attention goes to pairs that are evicted (lost mass), and how much its attention output changes, |change| /
|output|. Their rank correlations with KL say whether they would have told the same. KLs of parts need not add up to
that of all of them together: the last line has both.

 - layers: each layer that the method cuts, with the budget that it has there.
 - heads: each KV head of them; takes a number of slots (max_capacity_prompt).
 - treatments: everything, with each treatment of what is evicted.

Prints a table; with --output_path writes attribution_WHAT.png and .json; the last line is a JSON document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kv_lm_eval import config, console, files
from kv_lm_eval.analysis import lost_mass
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.cache.facts import ModelFacts
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.again import words_of
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.fidelity import score_beside
from kv_lm_eval.engine.streaming import Stream
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods import evicted
from kv_lm_eval.methods.budget import PerHead, Slots
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.stats import fidelity

WHAT = ("layers", "heads", "treatments")
ALL = "all together"
PROXIES = {"lost_mass": "lost mass", "change": "|change|/|output|"}
TOKENS = 1024  # of the text, by default


@dataclass(frozen=True)
class Part:
    """What is compressed, alone; layer and head where it is one of these."""

    name: str
    compression: Compression
    layer: int | None = None
    head: int | None = None


def parts_of(what: str, settings: dict[str, Any], facts: ModelFacts) -> list[Part]:
    """The parts of a method's settings; last, where parts make a whole, all together.

    Raises:
        UserError: the settings have no such parts.
    """
    whole = config.parse(settings)[0]
    if not whole.method.compresses:
        raise UserError(f"method={whole.method.name} evicts nothing, so that there is nothing to attribute")
    layers = [layer for layer in facts.cut_layers if layer not in whole.schedule.skip_layers]
    if what == "treatments":
        return list(_treatments(settings))
    if whole.method.ring:
        raise UserError(
            f"method={whole.method.name} overwrites pairs of all layers alike; method=streaming_llm keeps the same ones"
        )
    alone = {layer: _only(whole, facts, layer) for layer in layers}
    if what == "layers":
        return [*(Part(f"layer {layer}", one, layer) for layer, one in alone.items()), Part(ALL, whole)]
    if not isinstance(whole.budget, Slots) or whole.layers.differ or whole.heads.differ:
        raise UserError(
            "--attribute heads compresses each KV head to the same number of slots: it takes max_capacity_prompt, "
            "without layer_budget and head_budget"
        )
    heads = []
    for layer, one in alone.items():
        for head in range(facts.heads[layer][1]):
            slots = [[None] * kv_heads for _, (_, kv_heads) in sorted(facts.heads.items())]
            slots[layer][head] = whole.budget.max_capacity_prompt  # type: ignore[call-overload]
            budget = PerHead(tuple(map(tuple, slots)))
            heads.append(Part(f"layer {layer}, head {head}", replace(one, budget=budget), layer, head))
    return [*heads, Part(ALL, whole)]


def _only(whole: Compression, facts: ModelFacts, layer: int) -> Compression:
    others = tuple(i for i in facts.cut_layers if i != layer)
    return replace(whole, schedule=replace(whole.schedule, skip_layers=others))


def _treatments(settings: dict[str, Any]) -> Iterator[Part]:
    for name in evicted.available():
        try:
            yield Part(f"evicted={name}", config.parse({**settings, "evicted": name})[0])
        except UserError as error:
            print(f"evicted={name} is left out: {error}")


# ---------------------------------------------------------------------------------------------------- running


def attribute(
    model: PreTrainedModel, facts: ModelFacts, parts: Sequence[Part], prefix: int, document: Sequence[int], every: int
) -> list[dict[str, Any]]:
    """Each part's numbers: name, layer, head, kl, low, high, and lost_mass, change (None where no one layer is
    meant)."""
    out = []
    for part in parts:
        found: list[float] = []
        with _outputs(facts, part.layer, found), lost_mass.watched(-1 if part.layer is None else part.layer) as seen:
            (one,) = score_beside(
                model, partial(make_cache, part.compression, facts), [document], Stream(prefix, every)
            )[2]
        interval = fidelity.interval([one.kl])
        out.append(
            {
                "part": part.name,
                "layer": part.layer,
                "head": part.head,
                "kl": interval["mean"],
                "low": interval["low"],
                "high": interval["high"],
                "lost_mass": seen.mean(),
                "change": found[0] if found else None,
            }
        )
    return out


@contextmanager
def _outputs(facts: ModelFacts, layer: int | None, change: list[float]) -> Iterator[None]:
    """Inside, a layer's attention outputs are noted under both caches; after it `change` has the mean over the tokens
    of |difference| / |output|. What goes into the layer is the same: nothing below it is compressed."""
    if layer is None:
        yield
        return
    sides: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        (cache,) = (x for x in (*kwargs.values(), *args) if isinstance(x, CompressedCache))
        found = output[0] if isinstance(output, tuple) else output
        sides[cache.compression.method.compresses].append(found.reshape(-1, found.shape[-1]).double().cpu())

    handle = facts.modules[layer].register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    ours, full = (torch.cat(sides[side]) for side in (True, False))
    change.append(float(((ours - full).norm(dim=-1) / full.norm(dim=-1).clamp_min(1e-30)).mean()))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's: of the places of both, equal values sharing theirs; None where one of them is the same everywhere."""

    def places(values: Sequence[float]) -> np.ndarray:
        x = np.asarray(values, dtype=float)
        return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])

    first, second = places(a), places(b)
    if len(first) < 2 or not first.std() or not second.std():
        return None
    return float(np.corrcoef(first, second)[0, 1])


# ---------------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every part and prints the table; returns the exit status."""
    return console.command("fidelity", lambda: _main(argv), lambda: "Nothing of it is kept.")


def _main(argv: Sequence[str] | None) -> int:
    parser = console.Parser(prog="kv-lm-eval fidelity", description=__doc__)
    parser.add_argument("--attribute", required=True, choices=WHAT, help="what is compressed one at a time")
    parser.add_argument("--model_args", required=True, help="pretrained=NAME,method=NAME,... as for lm-eval")
    parser.add_argument("--text", type=Path, required=True, help="a text file, UTF-8")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of its beginning (default {TOKENS})")
    parser.add_argument("--output_path", type=Path, help="folder for the picture and the numbers")
    args = parser.parse_args(argv)
    if args.tokens < 2:
        raise UserError(f"--tokens {args.tokens} must be at least 2")
    if args.output_path:
        files.check_folder(args.output_path, "--output_path")
    found = _run(args)
    print(table(found))
    if args.output_path:
        written = args.output_path / f"attribution_{args.attribute}"
        files.write_json(written.with_suffix(".json"), found)
        _draw(found, written.with_suffix(".png"))
        print(f"\npicture: {written.with_suffix('.png')}")
    print(json.dumps(found))
    return 0


def _run(args: Any) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    from kv_lm_eval.experiments import baselines
    from kv_lm_eval.requests.rows import prefix_of, text_tokens
    from kv_lm_eval.tasks.perplexity import texts

    given = simple_parse_args_string(args.model_args)
    name, dtype, device = (given.pop(key, None) for key in ("pretrained", "dtype", "device"))
    if not name:
        raise UserError("which model? Add pretrained=NAME to --model_args (pretrained=kv-tiny is embedded)")
    compression, engine, rest = config.parse(given)
    if rest:
        raise UserError(
            f"{next(iter(rest))} in --model_args: this command takes pretrained, dtype, device and the method"
        )
    config.check_pretrained(name)
    text = texts.read(args.text)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = baselines.load_model(name, dtype or "auto", device)
    prefix = prefix_of(tokenizer)
    document = text_tokens(tokenizer, text, prefix)[0][: args.tokens]
    facts = wrap(model, compression)
    facts.words = words_of(tokenizer)
    every = compression.schedule.compress_every or engine.rolling_compress_every
    settings = {key: value for key, value in given.items() if key not in vars(engine)}
    parts = parts_of(args.attribute, settings, facts)
    numbers = attribute(model, facts, parts, prefix, document, every)
    known = {name: [one for one in numbers if one[name] is not None] for name in PROXIES}
    return {
        "model": str(name),
        "settings": compression.settings(),
        "text": args.text.name,
        "tokens": len(document),
        "attribute": args.attribute,
        "parts": numbers,
        "rank_correlation": {
            name: rank_correlation([one["kl"] for one in ones], [one[name] for one in ones])
            for name, ones in known.items()
        },
    }


def table(found: dict[str, Any]) -> str:
    """For people."""
    head = f"{found['model']}, {found['tokens']} tokens of {found['text']}, method={found['settings']['method']}"
    names = "".join(f"{words:>20}" for words in PROXIES.values())
    lines = [head, "", f"{'':24}{'KL, nats':>12}{'95 % interval':>26}{names}"]
    for one in found["parts"]:
        interval = "" if one["low"] is None else f"{one['low']:.3g} to {one['high']:.3g}"
        proxies = "".join(f"{'' if one[name] is None else f'{one[name]:.3g}':>20}" for name in PROXIES)
        lines.append(f"{one['part']:24}{one['kl']:12.4g}{interval:>26}{proxies}".rstrip())
    parts = _single(found)
    if len(parts) < len(found["parts"]):
        total = sum(one["kl"] for one in parts)
        lines += ["", f"sum of the parts {total:.4g}, all together {found['parts'][-1]['kl']:.4g}"]
    for name, value in found["rank_correlation"].items():
        if value is not None:
            lines.append(f"rank correlation of KL and {PROXIES[name]}: {value:.2f}")
    return "\n".join(lines)


def _single(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in found["parts"] if one["part"] != ALL]


def _draw(found: dict[str, Any], path: Path) -> None:
    """KL beside its proxies: bars, or layers by heads."""
    from io import BytesIO

    from kv_lm_eval.reporting.plots import drawing

    parts = _single(found)
    shown = {"kl": "KL, nats a token"} | {n: w for n, w in PROXIES.items() if any(o[n] is not None for o in parts)}
    heads = found["attribute"] == "heads"
    rows = len({one["layer"] for one in parts}) if heads else len(parts)
    wide = 1.9 + 0.45 * len({one["head"] for one in parts}) if heads else 3.4
    figure, axes = drawing.new_figure(1.2 + wide * len(shown), 1.7 + 0.3 * rows, 1, len(shown))
    for axis, (name, words) in zip(axes.flat, shown.items(), strict=True):
        rank = found["rank_correlation"].get(name)
        (_grid if heads else _bars)(figure, axis, parts, name)
        axis.set_title(words + ("" if rank is None else f"\nrank correlation {rank:.2f}"), fontsize=8.5)
    for axis in list(axes.flat)[1:]:
        axis.set_yticklabels([])
    title = f"One at a time: {found['settings']['method']} on {Path(found['model']).name}, {found['tokens']} tokens"
    figure.suptitle(title, fontsize=9.5)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    files.write_whole(path, out.getvalue())


def _grid(figure: Any, axis: Any, parts: Sequence[dict[str, Any]], name: str) -> None:
    """Layers by KV heads."""
    from matplotlib.colors import LogNorm

    layers, heads = (sorted({one[key] for one in parts}) for key in ("layer", "head"))
    values = np.full((len(layers), len(heads)), np.nan)
    for one in parts:
        values[layers.index(one["layer"]), one["head"]] = max(one[name] or 0, 1e-12)
    image = axis.imshow(values, cmap="viridis", aspect="auto", norm=LogNorm())
    axis.set_xticks(range(len(heads)), heads)
    axis.set_yticks(range(len(layers)), layers)
    axis.set_xlabel("KV head", fontsize=8.5)
    axis.set_ylabel("layer" if name == "kl" else "", fontsize=8.5)
    figure.colorbar(image, ax=axis)


def _bars(figure: Any, axis: Any, parts: Sequence[dict[str, Any]], name: str) -> None:
    """One a part; of KL with its interval."""
    from kv_lm_eval.reporting.plots import palette

    places = range(len(parts))
    colour = palette.COLOURS[0] if name == "kl" else palette.FAINT
    axis.barh(places, [one[name] or 0 for one in parts], color=colour)
    for y, one in zip(places, parts, strict=True):
        if name == "kl" and one["low"] is not None:
            axis.plot([one["low"], one["high"]], [y, y], color=palette.INK, lw=1)
    axis.set_yticks(places, [one["part"] for one in parts])
    axis.invert_yaxis()
