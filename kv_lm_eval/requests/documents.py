"""How whole documents are scored: lm-eval's `loglikelihood_rolling` requests, under a named protocol.

A request is (text,), as lm-eval's tasks ask, or (text, {"protocol": ..., ...}), as ours do. Any other model refuses
the second form: it could only answer under a protocol of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kv_lm_eval.engine.recompute import windows_of
from kv_lm_eval.engine.streaming import Stream
from kv_lm_eval.engine.windows import Plain, Window, score_windows, strided
from kv_lm_eval.errors import UserError
from kv_lm_eval.progress import Bar
from kv_lm_eval.requests import fidelity, likeliest
from kv_lm_eval.requests.document_scores import DocumentRecord, DocumentScore
from kv_lm_eval.requests.reading import CARRIED, Document, Reading, as_lm_eval, as_ours
from kv_lm_eval.requests.run import Run, log

Efficiency = dict[str, Any]  # of a request, for its sample


def score_requests(run: Run, disable_tqdm: bool) -> list[DocumentScore]:
    """Answers of all requests, in their order."""
    requests, method = run.requests, run.compression.method
    default = Reading("streaming" if run.compression.lossy or method.recomputed_tokens else "rolling")
    readings = [Reading.of(r.args[1]) if len(r.args) > 1 else default for r in requests]
    for reading in set(readings):
        _check(run, reading)
    if run.engine.fidelity and (windows := sum(reading.protocol not in CARRIED for reading in readings)):
        log.warning(
            "fidelity=True has no effect on %d of %d documents: their protocol reads each window in one forward, in "
            "which no cache is cut",
            windows,
            len(readings),
        )
    theirs = [len(r.args) == 1 or reading.protocol == "rolling" for r, reading in zip(requests, readings, strict=True)]
    texts = [
        (as_lm_eval if like_hf else as_ours)(run.lm, r.args[0], reading)
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
    if reading.fidelity and not method.uses_cache:
        raise UserError(f"fidelity compares a cache with the full one, and method={method.name} has none")


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
    compared, floor = run.engine.fidelity if reading.fidelity is None else reading.fidelity, None
    if compared:
        fidelity.check_lengths(run, [len(row) + 1 for row in documents.values()])
        floor = fidelity.noise_floor(run, list(documents.values()))
    shown = likeliest.first_of_tasks(run)
    stream = Stream(run.lm.prefix_token_id, every, prefill, run.lm.softmax_dtype)
    for batch in [*([i] for i in alone), *(rest[at : at + size] for at in range(0, len(rest), size))]:
        watch = run.stopwatch()
        scored, cache, beside = fidelity.score(
            compared,
            run.lm.model,
            run.caches(watch),
            [documents[i] for i in batch],
            stream,
            bar.update,
            {row for row, i in enumerate(batch) if i in shown},
        )
        watch.end()
        for i, one, against in zip(batch, scored, beside, strict=True):
            records[i] = DocumentRecord(
                reading=done,
                model=run.name,
                settings=run.settings,
                tokens=np.array(documents[i], dtype=np.int32),
                log_probs=one.log_probs.float().cpu().numpy(),
                greedy=one.greedy.cpu().numpy(),
                slots=one.slots.cpu().numpy(),
                evictions=[(int(fed), int(dropped)) for fed, dropped in one.evictions],
                **fidelity.fields_of(against, documents[i], run),
                noise_floor=floor,
            )
        if cache.batch:
            end = cache.snapshot()
            timings = watch.timings(len(batch), run.first_of_its_kind())
            if not compared:  # it would be the time of two runs
                end["timing"] = timings
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
            f"a document of {longest} tokens passes the {run.lm.max_length} positions that this model has learned, and "
            "one cache carried across it needs them; use method=full (lm-eval's windows) or a rotary model"
        )
    if not run.compression.method.in_cache_sinks:
        log.warning(
            "a document of %d tokens passes the model's maximum of %d: method=%s keeps true positions, so tokens "
            "beyond it are at distances and positions the model was not trained on (method=streaming_llm does not "
            "have this)",
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
            Plain(run.last_logits, size, run.lm.device, run.lm.softmax_dtype), [w for _, w in windows], bar.update
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
