"""Full cache and window recompute: the two baselines of a streamed text, measured once and kept on disk.

A baseline belongs to one key (model and its weights, text, number of tokens, window, dtype, device); its file is found
by the key's hash and holds the key itself, so that a baseline of another configuration is never used by mistake.
Both are given, because they answer different questions: recompute (a fresh forward over the last C tokens for each
token) is the quality that a bounded context can have and a straw man for speed; the full cache is what a user would
otherwise run.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from typing_extensions import TypedDict

from kv_lm_eval import __version__, config, files, identity, loading, tiny
from kv_lm_eval.cache.make import make_cache
from kv_lm_eval.engine.again import words_of
from kv_lm_eval.engine.check import wrap
from kv_lm_eval.engine.forward import device_of, logits_of
from kv_lm_eval.engine.prefill import NewCache
from kv_lm_eval.engine.recompute import windows_of
from kv_lm_eval.engine.stepwise import steps, synchroniser
from kv_lm_eval.engine.streaming import ScoredDocument, Stream, score_documents
from kv_lm_eval.engine.windows import Plain, score_windows
from kv_lm_eval.errors import UserError
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.requests.rows import prefix_of, text_tokens
from kv_lm_eval.tasks.perplexity import texts

WARM_UP = 4  # steps whose times are thrown away
WINDOWS_PER_FORWARD = 16
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class _Part(TypedDict):
    perplexity: float | None
    nll: list[float]
    tpot_s: float | None


class _Baseline(TypedDict):
    key: dict[str, Any]
    recompute: _Part
    full: _Part


@dataclass
class Setup:
    """A model and the tokens that it scores.

    Attributes:
        row: the prefix token and the text's tokens after it; all but the first are scored. text: its name for the key.
    """

    name: str
    model: transformers.PreTrainedModel
    tokenizer: Any
    row: list[int]
    text: str

    @property
    def prompt(self) -> list[int]:
        """The tokens fed: the last one is only scored."""
        return self.row[:-1]

    def key(self, length: int) -> dict[str, Any]:
        """Everything that decides a baseline's numbers; `length` is the recompute window in tokens."""
        device = device_of(self.model)
        return {
            "model": self.name,
            "identity": identity.digest(
                identity.before_loading({"pretrained": self.name, "dtype": str(self.model.dtype), "method": "full"})
            ),
            "text": self.text,
            "tokens_sha256": identity.digest(self.row),
            "tokens": len(self.row) - 1,
            "window": length,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}",
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
        }


def load(
    name: str,
    dataset: str,
    *,
    text_files: Sequence[str] | None = None,
    folder: str | None = None,
    dataset_config: str = "wikitext-2-raw-v1",
    documents: int = 1,
    max_eval_tokens: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> Setup:
    """The model as transformers makes it, and the first tokens of a text.

    Args:
        dataset: "wikitext" (all lines joined), "pg19" or "files"; several documents are joined by an empty line.
        folder: local files of wikitext or PG19, instead of the hub.
        max_eval_tokens: None: 4,096 of wikitext, 20,000 of anything else.
    """
    if dataset == "wikitext":
        rows = texts.wikitext(dataset_config, folder, joined=True)
    elif dataset == "pg19":
        rows = texts.pg19(folder, documents)
    else:
        rows = texts.files(list(text_files or []))[:documents]
    tokenizer, model = load_model(name, dtype, device)
    most = max_eval_tokens or (4096 if dataset == "wikitext" else 20_000)
    prefix = prefix_of(tokenizer)
    ids = text_tokens(tokenizer, "\n\n".join(row["text"] for row in rows), prefix)[0][:most]
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens; take a longer one")
    text = "+".join(row["name"] for row in rows)
    return Setup(name, model, tokenizer, [prefix, *ids], f"{dataset}:{text}")


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Tokenizer and model as transformers makes them.

    Raises:
        UserError: they could not be loaded.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    resolved = tiny.resolve(name)
    config.check_pretrained(name)
    with loading.loading(resolved, {}):
        tokenizer = transformers.AutoTokenizer.from_pretrained(resolved)
        model = loading.WholeModels.from_pretrained(resolved, dtype=dtype).eval()
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loading.check_loaded(model, tokenizer)
    return tokenizer, model


# ---------------------------------------------------------------------------------------------- measuring


def compressed(setup: Setup, **settings: Any) -> tuple[Compression, NewCache]:
    """Puts a method's cache under the model; afterwards it runs under such caches only."""
    compression, _, _ = config.parse(settings)
    facts = wrap(setup.model, compression)
    facts.words = words_of(setup.tokenizer)
    return compression, partial(make_cache, compression, facts)


def capacity(settings: Mapping[str, Any]) -> int:
    """Slots that a method keeps after a prune."""
    own = config.parse(dict(settings))[0].method.own_capacity
    if own is None:
        raise UserError(f"{settings}: give a window size or a total budget, so that the baseline's window is known")
    return own


def quality(setup: Setup, new_cache: NewCache, every: int, prefill: int) -> ScoredDocument:
    """Every token's log-probability under a method, not timed."""
    (document,), _ = score_documents(
        setup.model,
        new_cache,
        [setup.row[1:]],
        Stream(setup.row[0], max(every, 1), prefill_tokens=prefill, dtype=torch.float32),
    )
    return document


def decode_times(setup: Setup, new_cache: NewCache, prefills: Sequence[int], timed: int) -> tuple[list[float], int]:
    """Seconds of single steps after first forwards of the given lengths, cuts included; and the most bytes held."""
    seconds, kv_bytes = [], 0
    for prefill in prefills:
        row = setup.row[: prefill + WARM_UP + timed + 1]
        of_one = []
        for step, cache in steps(setup.model, new_cache, row, prefill):
            if not step.prefill:
                of_one.append(step.seconds)
                kv_bytes = max(kv_bytes, int(cache.snapshot()["kv_bytes_valid"][0]))
        seconds += of_one[WARM_UP:]
    return seconds, kv_bytes


def summary_of_times(seconds: Sequence[float]) -> dict[str, Any]:
    """TPOT (seconds a token, cuts included): mean, median and spread; None where nothing was timed."""
    if len(seconds) < 2:
        return {"tpot_s": None, "tpot_median_s": None, "tpot_p10_s": None, "tpot_p90_s": None, "timed_tokens": 0}
    tenths = statistics.quantiles(seconds, n=10)
    return {
        "tpot_s": statistics.fmean(seconds),
        "tpot_median_s": statistics.median(seconds),
        "tpot_p10_s": tenths[0],
        "tpot_p90_s": tenths[-1],
        "timed_tokens": len(seconds),
    }


def perplexity_of(log_probs: torch.Tensor) -> float | None:
    """exp of the mean; None of nothing."""
    return math.exp(-log_probs.double().mean().item()) if len(log_probs) else None


def spread(setup: Setup, timed: int, count: int = 4) -> list[int]:
    """Context lengths evenly over the text, at which a full cache's steps are timed: they get slower with length."""
    last = len(setup.prompt) - timed - WARM_UP
    return sorted({max(1, round(last * (i + 1) / count)) for i in range(count)})


@torch.inference_mode()
def measure(setup: Setup, length: int, runs: int, timed: int) -> dict[str, Any]:
    """Both baselines. The model must be as transformers made it; it is left wrapped.

    Args:
        length: tokens that recompute sees. runs: repetitions of the timing. timed: tokens timed in each.
    """
    model, device = setup.model, device_of(setup.model)

    def call(ids: torch.Tensor, k: int) -> torch.Tensor:
        return logits_of(model, ids, keep=k).float()

    windows = list(windows_of(setup.row, 1, length))
    scores = score_windows(Plain(call, 1, device), windows[:1]) + score_windows(
        Plain(call, WINDOWS_PER_FORWARD, device), windows[1:]
    )
    log_probs = torch.cat([lp for lp, _ in scores])
    wait, recompute_s = synchroniser(model), []
    for _ in range(runs):
        of_one = []
        for window in windows[1 : 1 + WARM_UP + max(2, timed // 8)]:
            ids = torch.tensor([window.context], device=device)
            wait()
            start = time.perf_counter()
            call(ids, 1)
            wait()
            of_one.append(time.perf_counter() - start)
        recompute_s += of_one[WARM_UP:]
    _, new_cache = compressed(setup, method="full")
    full = quality(setup, new_cache, 1, 0)
    full_s, kv_bytes = [], 0
    for _ in range(runs):
        seconds, kv_bytes = decode_times(setup, new_cache, spread(setup, timed // 4), timed // 4)
        full_s += seconds
    return {
        "key": setup.key(length),
        "runs": runs,
        "made_with": {"kv-lm-eval": __version__, **{p: version(p) for p in ("torch", "transformers")}},
        "recompute": {
            "perplexity": perplexity_of(log_probs),
            "nll": rounded(log_probs),
            **summary_of_times(recompute_s),
        },
        "full": {
            "perplexity": perplexity_of(full.log_probs),
            "nll": rounded(full.log_probs),
            "peak_slots": int(full.slots.max()),
            "kv_bytes_peak": kv_bytes,
            "beyond_trained_length": beyond_trained_length(setup, int(full.slots.max())),
            **summary_of_times(full_s),
        },
    }


def rounded(log_probs: torch.Tensor) -> list[float]:
    """Negative log-probabilities for JSON."""
    return [round(-x, 6) for x in log_probs.tolist()]


def beyond_trained_length(setup: Setup, slots: int) -> bool | None:
    """Whether more positions are in use than the model was trained on; None where its configuration does not say."""
    most = getattr(setup.model.config.get_text_config(), "max_position_embeddings", None)
    return None if most is None else slots > most


# ---------------------------------------------------------------------------------------------- keeping


def path_of(key: Mapping[str, Any], folder: Path) -> Path:
    """Where a baseline with this key is kept."""
    kind = str(key["text"]).split(":")[0]
    return folder / f"{kind}_{key['tokens']}_{identity.digest(dict(key))[:12]}.json"


def write(baseline: Mapping[str, Any], folder: Path) -> Path:
    """Keeps a baseline."""
    file = path_of(baseline["key"], folder)
    files.write_json(file, baseline, indent=None)
    return file


def read(file: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """A kept baseline.

    Raises:
        UserError: it is damaged, or belongs to another configuration.
    """
    baseline = files.read_json(file, dict[str, Any])
    files.check(baseline, _Baseline, str(file))
    theirs = baseline["key"]
    if different := [f"{k}: {theirs.get(k)!r} there, {v!r} here" for k, v in key.items() if theirs.get(k) != v]:
        raise UserError(
            f"{file} is the baseline of another configuration ({'; '.join(different)}). Measure this one with "
            "scripts/fixed_baseline.py, or leave the file out to have it measured"
        )
    return baseline
