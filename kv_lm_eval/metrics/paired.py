"""Two runs over the same tokens, compared token by token.

A run is a .jsonl file: lm-eval's `samples_*.jsonl` of a kv_ppl task (--log_samples), or lines of per-token records as
our scripts write them: {"document", "reading", "model", "settings", "tokens", "nll", "first_eviction"}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import NotRequired, TypedDict

from kv_lm_eval import files
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.perplexity import percent
from kv_lm_eval.stats import blocks

Record = Mapping[str, Any]


class _Record(TypedDict):
    reading: dict[str, Any]
    model: str
    tokens: list[int]
    nll: list[float | None]
    first_eviction: int | None
    settings: NotRequired[dict[str, Any]]
    document: NotRequired[str]
    cuts: NotRequired[int]
    kl: NotRequired[list[float | None]]  # of points with fidelity=True


def read(file: Path) -> dict[str, Record]:
    """The per-token record of each document, by the document's name.

    Raises:
        UserError: no such file or record in it.
    """
    records: dict[str, Record] = {}
    for number, row in files.read_jsonl(file, dict[str, Any]):
        doc = row.get("doc")
        doc = doc if isinstance(doc, dict) else {}
        found = doc.get("per_token") or (row if "nll" in row else None)
        if found is None:
            raise UserError(
                f"{file} has no per-token numbers: it must be the samples_*.jsonl of a kv_ppl task run with "
                "--model kvcompressed --log_samples, or written by one of our scripts"
            )
        record = files.check(found, _Record, f"{file}, line {number}")
        if len(record["tokens"]) != len(record["nll"]):
            raise UserError(
                f"{file}, line {number}: {len(record['tokens'])} tokens and {len(record['nll'])} numbers for them"
            )
        name = str(doc.get("name", row.get("document", row.get("doc_id", len(records)))))
        if name in records:
            raise UserError(f"{file} has two documents named {name!r}")
        records[name] = record
    if not records:
        raise UserError(f"{file} is empty")
    return records


def differences(a: Mapping[str, Record], b: Mapping[str, Record]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per document nll(B) - nll(A) of the tokens that both runs scored, NaN elsewhere; and which of these come after
    the first eviction of either run.

    Raises:
        UserError: different models, protocols, documents or tokens.
    """
    if set(a) != set(b):
        only = sorted(set(a) ^ set(b))[:3]
        raise UserError(f"the two files hold different documents; only in one of them: {', '.join(only)}")
    out, late = [], []
    for name, one in a.items():
        other = b[name]
        for what, x, y in (
            ("models", one["model"], other["model"]),
            *(
                (f"{w}s" if w == "protocol" else w, one["reading"].get(w), other["reading"].get(w))
                for w in ("protocol", "strided_length", "stride")
            ),
        ):
            if x != y:
                raise UserError(
                    f"{name}: {what} differ ({x} and {y}), so that the difference would not be the method's; compare "
                    "runs that differ in the method or its settings only"
                )
        n = min(len(one["tokens"]), len(other["tokens"]))
        if one["tokens"][:n] != other["tokens"][:n]:
            raise UserError(f"{name}: the two runs scored different tokens: another text or another tokenizer")
        nll = [np.array([np.nan if v is None else v for v in r["nll"][:n]], dtype=np.float64) for r in (one, other)]
        out.append(nll[1] - nll[0])
        first = min(n if r["first_eviction"] is None else r["first_eviction"] for r in (one, other))
        late.append(np.arange(n) >= first)
    return out, late


def compare(
    a: Mapping[str, Record], b: Mapping[str, Record], block: int | None = None, level: float = 0.95
) -> dict[str, Any]:
    """B against A: over all shared tokens and over those after the first eviction of either run.

    Args:
        block: tokens of a block, where there are fewer than six documents; None: from the length.
    """
    delta, late = differences(a, b)
    parts = {"all": delta, "after_first_eviction": [np.where(k, d, np.nan) for d, k in zip(delta, late, strict=True)]}
    return {
        "documents": len(delta),
        "level": level,
        **{name: difference(values, block, level) for name, values in parts.items()},
    }


def difference(values: Sequence[np.ndarray], block: int | None = None, level: float = 0.95) -> dict[str, Any]:
    """A mean difference of nll over tokens and as a change of the perplexity, with their intervals."""
    found = blocks.interval(values, block, level)
    return {
        "tokens": int(sum(np.isfinite(v).sum() for v in values)),
        **{name: found[name] for name in ("unit", "units", "block_tokens", "reason")},
        "nll_difference_nats": found["mean"],
        "low": found["low"],
        "high": found["high"],
        "ppl_change_percent": percent(found["mean"]),
        "ppl_change_low_percent": percent(found["low"]),
        "ppl_change_high_percent": percent(found["high"]),
    }
