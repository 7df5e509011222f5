"""How whole documents are scored: lm-eval's `loglikelihood_rolling` requests, under a named protocol.

A request is (text,), as lm-eval's tasks ask, or (text, {"protocol": ..., ...}), as ours do. Any other model refuses
the second form: it could only answer under a protocol of its own. The answer is a float, as lm-eval wants it, that
remembers what it is the sum of.

Under a protocol of ours the prefix token stands before a document once, whatever the tokenizer adds by itself. Only
lm-eval's own reading, which `full` shares with `hf`, puts it before a tokenizer's own BOS; that is said once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kv_lm_eval.engine.recompute import windows_of
from kv_lm_eval.engine.streaming import score_documents
from kv_lm_eval.engine.windows import Window, score_windows, strided
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.progress import Bar
from kv_lm_eval.requests.rows import text_tokens
from kv_lm_eval.requests.run import Run, log

PROTOCOLS = {
    "streaming": "one cache across the document, cut by the schedule from the first token on",
    "prefill_then_stream": "the first prefill_tokens in one forward and a cut after it, then as streaming",
    "strided": "windows of strided_length tokens, stride apart, each a forward of its own; new tokens are scored",
    "rolling": "lm-eval's disjoint windows of the model's maximum length",
}
LONGEST_CHARACTER = 8  # tokens that one character may take, and more than any tokenizer needs
Efficiency = dict[str, Any]  # of a request, for its sample
CARRIED = ("streaming", "prefill_then_stream")  # one cache goes through the document, so that compression can act


@dataclass(frozen=True)
class Reading:
    """How a document is read.

    Args:
        protocol: a name of PROTOCOLS.
        max_eval_tokens: only the first so many tokens of each document; None: all.
        prefill_tokens: prefill_then_stream: tokens of the first forward, prefix included; None: the method's budget.
        strided_length, stride: strided: tokens of a window (None: the model's maximum) and from one to the next
            (None: half a window).
    """

    protocol: str = "streaming"
    max_eval_tokens: int | None = None
    prefill_tokens: int | None = None
    strided_length: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.protocol, str) or self.protocol not in PROTOCOLS:
            known = "; ".join(f"{name}: {what}" for name, what in PROTOCOLS.items())
            raise UserError(
                f"protocol={self.protocol!r}{close_names(str(self.protocol), PROTOCOLS)}; there are {known}"
            )
        for name, least in (("max_eval_tokens", 2), ("prefill_tokens", 1), ("strided_length", 2), ("stride", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UserError(f"{name}={value!r} must be a whole number of tokens, at least {least}, or null")
        needs = {"prefill_tokens": "prefill_then_stream", "strided_length": "strided", "stride": "strided"}
        for name, protocol in needs.items():
            if getattr(self, name) is not None and self.protocol != protocol:
                raise UserError(f"{name}={getattr(self, name)} has no effect: it is for protocol={protocol}")
        if self.stride and self.strided_length and self.stride > self.strided_length:
            raise UserError(
                f"stride={self.stride} is longer than strided_length={self.strided_length}: the tokens between two "
                "windows would never be scored"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Reading:
        """From a request's second argument."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})

    def options(self) -> dict[str, Any]:
        """The request's second argument: what is not None, so that --use_cache tells readings apart."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass
class DocumentRecord:
    """One scored document of n tokens, those that stand before the text not among them.

    Attributes:
        reading: as asked, with the defaults filled in. model, settings: what scored it.
        tokens: [n] int32 ids. log_probs: [n] float32 nats, NaN where a token was not scored. greedy: [n] bool.
        slots: [n] int32, pairs per KV head that were visible when the token was predicted; None for windows.
        evictions: (tokens fed, slots dropped) of each cut; the prefix token counts as fed.
        start, end: the tokens stand for text[start:end]; the whole text where nothing was left off.
    """

    reading: dict[str, Any]
    model: str
    settings: dict[str, Any]
    tokens: np.ndarray
    log_probs: np.ndarray
    greedy: np.ndarray
    slots: np.ndarray | None = None
    evictions: list[tuple[int, int]] = field(default_factory=list)
    end: int = 0
    start: int = 0

    @property
    def scored(self) -> np.ndarray:
        """[n] bool."""
        return np.isfinite(self.log_probs)

    def after_first_eviction(self) -> np.ndarray:
        """[n] bool: tokens predicted by a query that came after the first cut."""
        first = self.evictions[0][0] if self.evictions else len(self.tokens)
        return np.arange(len(self.tokens)) >= first

    def per_token(self) -> dict[str, Any]:
        """For JSON: what comparing two runs token by token takes."""
        log_probs = np.where(self.scored, self.log_probs, np.nan)
        return {
            "reading": self.reading,
            "model": self.model,
            "settings": self.settings,
            "tokens": self.tokens.tolist(),
            "nll": [None if x != x else round(-x, 6) for x in log_probs.tolist()],
            "first_eviction": self.evictions[0][0] if self.evictions else None,  # tokens fed before it
            "cuts": len(self.evictions),
        }


@dataclass(frozen=True)
class Document:
    """A text as tokens.

    Attributes:
        head: tokens before the text, not scored; the prefix, but for windows that start with the text itself.
        tokens: to be scored; they stand for text[start:end].
    """

    head: tuple[int, ...]
    tokens: list[int]
    start: int
    end: int


class DocumentScore(float):
    """Log-likelihood of a document in nats, with its record; pickles (--use_cache), and is a number in JSON.

    `efficiency` is what its sample says of the request (`samples.py`).
    """

    record: DocumentRecord
    efficiency: dict[str, Any] | None

    def __new__(cls, record: DocumentRecord, efficiency: dict[str, Any] | None = None) -> DocumentScore:
        self = super().__new__(cls, float(np.nansum(record.log_probs, dtype=np.float64)))
        self.record, self.efficiency = record, efficiency
        return self

    def __reduce__(self) -> Any:
        return DocumentScore, (self.record, self.efficiency)

    def bare(self) -> DocumentScore:
        """Without what belongs to one run."""
        return DocumentScore(self.record)


def score_requests(run: Run, disable_tqdm: bool) -> list[DocumentScore]:
    """Answers of all requests, in their order."""
    requests, method = run.requests, run.compression.method
    default = Reading("streaming" if run.compression.lossy or method.recomputed_tokens else "rolling")
    readings = [Reading.of(r.args[1]) if len(r.args) > 1 else default for r in requests]
    for reading in set(readings):
        _check(run, reading)
    theirs = [len(r.args) == 1 or reading.protocol == "rolling" for r, reading in zip(requests, readings, strict=True)]
    texts = [
        (_as_lm_eval if like_hf else _as_ours)(run.lm, r.args[0], reading)
        for r, reading, like_hf in zip(requests, readings, theirs, strict=True)
    ]
    _say_if_twice(run.lm, [text for text, like_hf in zip(texts, theirs, strict=True) if like_hf])
    answers: dict[int, DocumentScore] = {
        i: kept for i in range(len(requests)) if (kept := run.kept(i, None)) is not None
    }
    groups: dict[Reading, list[int]] = defaultdict(list)
    for i, reading in enumerate(readings):
        if i not in answers:
            groups[reading].append(i)
    for reading, members in groups.items():
        of_group = {i: texts[i] for i in members}
        carried = reading.protocol in CARRIED and method.uses_cache
        records, known = (_stream if carried else _windows)(run, reading, of_group, disable_tqdm)
        for i, record in records.items():
            record.start, record.end = texts[i].start, texts[i].end
            answers[i] = DocumentScore(record, known.get(i))
            run.keep(i, answers[i].bare(), None)
    return [answers[i] for i in range(len(requests))]


def _check(run: Run, reading: Reading) -> None:
    """Refuses a reading under which the method would not do what its name says."""
    method = run.compression.method
    if reading.protocol in CARRIED and not method.uses_cache and not method.recomputed_tokens:
        raise UserError(
            f"protocol={reading.protocol} carries one cache across a document and method={method.name} has none; use "
            "method=full for the uncompressed cache, or protocol=rolling"
        )
    if reading.protocol not in CARRIED and (run.compression.lossy or method.recomputed_tokens):
        raise UserError(
            f"protocol={reading.protocol} scores each window in one forward, in which method={method.name} has no "
            "effect: the number would be the full cache's under another name. Use protocol=streaming, or method=full"
        )


def _as_lm_eval(lm: HFLM, text: str, reading: Reading) -> Document:
    """What lm-eval's hf model reads: the prefix, and then the tokenizer's own BOS where it adds one."""
    tokens = lm.tok_encode(text)
    kept, end = _first(lm, text, tokens, reading.max_eval_tokens, own_special=True)
    return Document((lm.prefix_token_id,), kept, 0, end)


def _as_ours(lm: HFLM, text: str, reading: Reading) -> Document:
    """The prefix once; strided windows start with what the tokenizer puts before a text, as in their recipe."""
    if reading.protocol != "strided":
        tokens, start = text_tokens(lm.tokenizer, text, lm.prefix_token_id)
        kept, end = _first(lm, text[start:], tokens, reading.max_eval_tokens, own_special=False)
        return Document((lm.prefix_token_id,), kept, start, start + end)
    tokens = lm.tok_encode(text, add_special_tokens=False)
    whole = lm.tok_encode(text)
    before = next((k for k in range(len(whole) - len(tokens) + 1) if whole[k : k + len(tokens)] == tokens), 0)
    kept, end = _first(lm, text, tokens, reading.max_eval_tokens, own_special=False)
    return Document(tuple(whole[:before]), kept, 0, end)


def _say_if_twice(lm: HFLM, texts: Sequence[Document]) -> None:
    """One warning a run about documents of lm-eval's own reading that begin with the prefix token twice."""
    twice = sum(list(text.head) == text.tokens[:1] for text in texts)
    if twice:
        log.warning(
            "%d of %d documents begin with %r twice: lm-eval's rolling requests put it before every text, and this "
            "model's tokenizer (or the text) does too. The second is scored as text, under hf and here alike; "
            "add_bos_token=False or the kv_ppl tasks, but for protocol=rolling, have it once",
            twice,
            len(texts),
            lm.tokenizer.decode([lm.prefix_token_id]),
        )


def _first(lm: HFLM, text: str, tokens: list[int], most: int | None, own_special: bool) -> tuple[list[int], int]:
    """At most `most` of a text's tokens, and how many of its characters they stand for.

    A cut never falls inside a character that takes several tokens: it moves back to where that begins.

    Args:
        own_special: whether the tokenizer's special tokens are among them.
    """
    if most is None or len(tokens) <= most:
        return tokens, len(text)
    for keep in range(most, max(0, most - LONGEST_CHARACTER), -1):
        decoded = lm.tokenizer.decode(
            tokens[:keep], skip_special_tokens=own_special, clean_up_tokenization_spaces=False
        )
        if text.startswith(decoded):
            return tokens[:keep], len(decoded)
    return _by_offsets(lm, text, tokens, most)


def _by_offsets(lm: HFLM, text: str, tokens: list[int], most: int) -> tuple[list[int], int]:
    """The same for tokenizers whose decoding does not give the text back, as where they change its spaces."""
    for special in (True, False) if lm.tokenizer.is_fast else ():
        encoding = lm.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if encoding["input_ids"] == tokens:
            spans, keep = encoding["offset_mapping"], most
            while keep > 0 and spans[keep] != (0, 0) and spans[keep][0] < spans[keep - 1][1]:
                keep -= 1
            return tokens[:keep], max(end for _, end in spans[:keep])
    raise UserError(
        f"max_eval_tokens={most}: this model's tokenizer does not say which text {most} tokens stand for, so that "
        "words and bytes could not be counted. Use a fast tokenizer, or give a shorter text and no limit"
    )


def _stream(
    run: Run,
    reading: Reading,
    texts: Mapping[int, Document],
    disable_tqdm: bool,
) -> tuple[dict[int, DocumentRecord], dict[int, Efficiency]]:
    """One cache across each document, longest first."""
    documents = {i: text.tokens for i, text in texts.items()}
    _check_lengths(run, list(documents.values()))
    every = run.compression.schedule.compress_every or run.engine.rolling_compress_every
    prefill = _prefill_tokens(run, reading)
    done = {**reading.options(), "protocol": reading.protocol, "prefill_tokens": prefill, "compress_every": every}
    order = sorted(documents, key=lambda i: -len(documents[i]))
    size = run.batch_size or 1
    records: dict[int, DocumentRecord] = {}
    known: dict[int, Efficiency] = {}
    bar = Bar(
        total=sum(map(len, documents.values())),
        unit="tok",
        disable=run.hidden(disable_tqdm),
        desc=f"kvcompressed {reading.protocol}",
    )
    alone = [i for i in order if run.alone(len(documents[i]) + 1)]
    rest = order[len(alone) :]
    for batch in [*([i] for i in alone), *(rest[at : at + size] for at in range(0, len(rest), size))]:
        watch = run.stopwatch()
        with run.autocast():
            scored, cache = score_documents(
                run.lm.model,
                run.caches(watch),
                run.lm.prefix_token_id,
                [documents[i] for i in batch],
                every,
                run.lm.softmax_dtype,
                bar.update,
                prefill_tokens=prefill,
            )
        watch.end()
        for i, one in zip(batch, scored, strict=True):
            records[i] = DocumentRecord(
                reading=done,
                model=run.name,
                settings=run.settings,
                tokens=np.array(documents[i], dtype=np.int32),
                log_probs=one.log_probs.float().cpu().numpy(),
                greedy=one.greedy.cpu().numpy(),
                slots=one.slots.cpu().numpy(),
                evictions=[(int(fed), int(dropped)) for fed, dropped in one.evictions],
            )
        if cache.batch:
            end = cache.snapshot()
            end["timing"] = watch.timings(len(batch), run.first_of_its_kind())
            known.update((i, r.efficiency()) for i, r in zip(batch, run.record(batch, end, end), strict=True))
    bar.close()
    return records, known


def _check_lengths(run: Run, documents: Sequence[list[int]]) -> None:
    """Refuses what learned positions cannot do, and warns where true positions leave what the model was trained on."""
    longest = max(map(len, documents), default=0)
    if longest < run.lm.max_length:
        return
    assert run.facts is not None, "documents are carried in a cache"
    learned = run.facts.rope is not None and not run.facts.rope.available(0)
    if learned and longest > run.lm.max_length:
        raise UserError(
            f"a document of {longest} tokens passes the {run.lm.max_length} positions that this "
            "model has learned, and one "
            "cache carried across it needs them; use method=full (lm-eval's windows) or a rotary model"
        )
    if not run.compression.method.in_cache_sinks:
        log.warning(
            "a document of %d tokens passes the model's maximum of %d: method=%s keeps true "
            "positions, so tokens beyond it "
            "are at distances and positions the model was not trained on (method=streaming_llm does not have this)",
            longest,
            run.lm.max_length,
            run.compression.method.name,
        )


def _prefill_tokens(run: Run, reading: Reading) -> int:
    """Tokens of the first forward: none for streaming; by default as many as the method keeps."""
    if reading.protocol == "streaming":
        return 0
    if reading.prefill_tokens is not None:
        return reading.prefill_tokens
    if not run.compression.method.compresses:
        return 0  # nothing is cut, so that the same numbers come out whatever the first forward holds
    budget = getattr(run.compression.budget, "max_capacity_prompt", None)
    if budget is None:
        raise UserError(
            f"protocol=prefill_then_stream: method={run.compression.method.name} has no fixed number of slots to take "
            'for the first forward; add "prefill_tokens": N to --metadata'
        )
    return int(budget)


def _windows(
    run: Run,
    reading: Reading,
    texts: Mapping[int, Document],
    disable_tqdm: bool,
) -> tuple[dict[int, DocumentRecord], dict[int, Efficiency]]:
    """Every window one plain forward; under `rolling` the same number as lm-eval's hf model; no rank waits.

    A method that recomputes a bounded context for each token comes here under `streaming`.
    """
    length = reading.strided_length or run.lm.max_length
    if length > run.lm.max_length:
        raise UserError(f"strided_length={length} passes the model's maximum of {run.lm.max_length} tokens")
    done = {**reading.options(), "protocol": reading.protocol}
    if run.compression.method.recomputed_tokens:
        done["recomputed_tokens"] = run.compression.method.recomputed_tokens
    else:
        done["window_length"] = length
    if reading.protocol == "strided":
        done["stride"] = min(reading.stride or max(1, length // 2), length)
    windows = [(i, window) for i, text in texts.items() for window in _cut(done, text)]
    longest = max((len(w.context) + len(w.targets) for _, w in windows), default=0)
    size = 1 if run.alone(longest) else run.batch_size or 1
    hidden = run.hidden(disable_tqdm)
    with Bar(
        total=sum(len(w.targets) for _, w in windows), unit="tok", disable=hidden, desc="kvcompressed windows"
    ) as bar:
        scores = score_windows(
            run.last_logits,
            [w for _, w in windows],
            size,
            run.lm.device,
            run.lm.softmax_dtype,
            bar.update,
        )
    records = {
        i: DocumentRecord(
            reading=done,
            model=run.name,
            settings=run.settings,
            tokens=np.array(text.tokens, dtype=np.int32),
            log_probs=np.full(len(text.tokens), np.nan, dtype=np.float32),
            greedy=np.zeros(len(text.tokens), dtype=bool),
        )
        for i, text in texts.items()
    }
    for (i, window), (log_probs, greedy) in zip(windows, scores, strict=True):
        place = slice(window.start, window.start + len(window.targets))
        records[i].log_probs[place], records[i].greedy[place] = log_probs.numpy(), greedy.numpy()
    members = list(texts)
    made = run.record_uncached(members, [len(texts[i].tokens) for i in members])
    return records, {i: r.efficiency() for i, r in zip(members, made, strict=True)}


def _cut(done: Mapping[str, Any], text: Document) -> Iterator[Window]:
    """A document's windows; their targets are counted from the first token of the text."""
    row, first = [*text.head, *text.tokens], len(text.head)
    if "recomputed_tokens" in done:
        windows = windows_of(row, first, done["recomputed_tokens"])
    elif done["protocol"] == "strided":
        windows = strided(row, done["window_length"], done["stride"])
    else:
        windows = _disjoint(text, done["window_length"])
    for context, targets, start in windows:
        before = max(0, first - start)  # of what stands before the text nothing is scored
        if len(targets) > before:
            yield Window([*context, *targets[:before]], targets[before:], start + before - first)


def _disjoint(text: Document, length: int) -> Iterator[Window]:
    """lm-eval's rolling windows, counted with the prefix."""
    (prefix,), start = text.head, 1
    for pair in get_rolling_token_windows(text.tokens, prefix, length, context_len=1):
        context, targets = make_disjoint_window(pair)
        yield Window(context, targets, start)
        start += len(targets)
