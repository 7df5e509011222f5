"""How answers are generated: lm-eval's `generate_until` requests, in batches of prompts with the same settings.

Settings, truncation, stops and what is taken off an answer are lm-eval's own, so that method=full gives the answers of
its hf model. One thing differs: an answer here is the one that its prompt would have alone, whatever shares its batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lm_eval.models.utils import postprocess_generated_text
from transformers import StoppingCriteriaList

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.forward import generate_with, logits_of
from kv_lm_eval.engine.generate import by_rows, noting_first_token
from kv_lm_eval.engine.lent import starting_anew
from kv_lm_eval.engine.question import Contexts, Tails
from kv_lm_eval.engine.start import left_padded, start_for_all
from kv_lm_eval.engine.together import prefill_for_all
from kv_lm_eval.errors import OUT_OF_MEMORY, UserError
from kv_lm_eval.metrics.latency import Timing
from kv_lm_eval.progress import Bar
from kv_lm_eval.requests import boundaries, fidelity
from kv_lm_eval.requests.boundaries import Boundary
from kv_lm_eval.requests.gen_settings import GenSettings
from kv_lm_eval.requests.halving import largest_batch
from kv_lm_eval.requests.others import Others
from kv_lm_eval.requests.prompt import Prompt
from kv_lm_eval.requests.run import Run, log
from kv_lm_eval.requests.samples import NO_MEMORY, Text
from kv_lm_eval.requests.stops import Stops


def generate(run: Run, disable_tqdm: bool, beside: Sequence[Run] = ()) -> list[str]:
    """Answers of all requests, in their order.

    Args:
        beside: the same requests under other compressions, answered on the way where they can be.
    """
    asked = read(run)
    answers: dict[int, Text] = {p.i: kept for p in asked if (kept := run.kept(p.i, p.boundary)) is not None}
    prompts = [p for p in asked if p.i not in answers]
    others = Others(run, beside)
    size = run.batch_size or _largest_batch(run, prompts, others.runs)
    contexts = Contexts(p.head for p in prompts)
    floor = fidelity.floor_of(run, [p.ids for p in prompts], [p.most_tokens for p in prompts])

    def work(rows: Sequence[Prompt]) -> list[Text]:
        shared = rows[0].settings.of_each_row
        (_, made), *theirs = others.served(len(rows), lambda runs: _generate(runs, rows, contexts), shared)
        for other, answers_of_it in theirs:  # before the run's own: what it keeps, all have
            for p, answer in zip(rows, answers_of_it, strict=True):
                other.keep(p.i, answer, p.boundary)
        if floor is None:
            return made
        return fidelity.compared_answers(
            run, floor, rows, made, lambda full, some: _generate([full], some, Contexts(()))[0]
        )

    desc = "Running generate_until requests"
    with Bar(total=len(prompts), disable=run.hidden(disable_tqdm), desc=desc) as bar:
        for batch in _batches(run, prompts, size):
            docs = [run.doc(p.i) for p in batch]
            bar.set_postfix_str("; ".join(dict.fromkeys(str(doc.get("progress_label", "")) for doc in docs)))
            for part, result in run.halving.run(
                batch,
                work,
                lambda p: p.most_tokens,
                lambda p: bool(run.doc(p.i).get("takes_failures")),
            ):
                if result is None:
                    label = run.doc(part[0].i).get("progress_label", "a prompt")
                    tokens = len(part[0].ids)
                    log.warning("out of memory: %s (%d tokens) is not scored; the rest goes on", label, tokens)
                    answers[part[0].i] = Text(OUT_OF_MEMORY, NO_MEMORY)
                for p, answer in zip(part, result or (), strict=False):
                    answers[p.i] = answer
                    run.keep(p.i, answer, p.boundary)
                bar.update(len(part))
    return [answers[p.i] for p in asked]


# ------------------------------------------------------------------------------------ what is asked


def read(run: Run) -> list[Prompt]:
    """The requests' prompts and settings; refuses, before any work is done, what cannot be run."""
    lm = run.lm
    settings = [GenSettings.read(run, i) for i in range(len(run.requests))]
    room = [lm.max_length - s.max_new_tokens for s in settings]
    ids = [_encode(run, i) for i in range(len(run.requests))]
    run.check_prompts(list(map(len, ids)), room)
    found: list[Boundary | None] = [None] * len(ids)
    if run.question_first:
        found = boundaries.find_all(run.requests, run.engine.question_field, run.tokens_from, run.called, run.encode)
    prompts = []
    for i, (row, most, one, boundary) in enumerate(zip(ids, room, settings, found, strict=True)):
        prompt = Prompt(i, row[-most:], one, boundary)
        if boundary is not None:
            boundaries.check(len(prompt.ids), boundary, run.called(i))
        if prompt.most_tokens <= len(prompt.ids):
            raise UserError(
                f"max_length={one.max_length} in the generation settings counts the prompt, and that of "
                f"{run.called(i)} has {len(prompt.ids)} tokens: nothing can be generated. Use max_gen_toks"
            )
        prompts.append(prompt)
    if cut := sum(len(p.ids) < len(row) for p, row in zip(prompts, ids, strict=True)):
        log.warning("%d of %d prompts lose their beginning (overlong=truncate_left)", cut, len(prompts))
    return prompts


def _encode(run: Run, i: int) -> list[int]:
    """A prompt's tokens as lm-eval has them for a prompt alone: in a batch it asks the first text about BOS."""
    text = run.requests[i].args[0]
    if (parts := boundaries.apart(text, run.doc(i))) is not None:
        return [token for part in parts for token in run.encode(part)]
    ids, _ = run.lm.tok_batch_encode([text], truncation=run.lm.truncation)
    return [int(token) for token in ids[0].tolist()]


def _batches(run: Run, prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Prompts with the same settings, longest first, as lm-eval forms its batches; split where rows would not be
    independent of each other."""
    alike: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        alike[prompt.settings.key].append(prompt)
    for group in alike.values():
        ordered = sorted(group, key=lambda p: (-len(p.head), p.head, -len(p.ids), run.requests[p.i].args[0]))
        for at in range(0, len(ordered), size):
            parts: dict[Any, list[Prompt]] = defaultdict(list)
            for prompt in ordered[at : at + size]:
                parts[_apart(run, prompt)].append(prompt)
            yield from (parts[key] for key in sorted(parts, reverse=True))


def _apart(run: Run, prompt: Prompt) -> tuple[int, ...]:
    """Prompts for which this differs are not run in one batch."""
    if prompt.settings.beams > 1 or run.alone(prompt.most_tokens):  # lm-eval's stops look at one beam for each row
        return (1, -prompt.i)
    if prompt.settings.looks_at_prompt:  # and so at its padding
        return (len(prompt.ids), prompt.tail)
    return ()


def _largest_batch(run: Run, prompts: Sequence[Prompt], runs: Sequence[Run]) -> int:
    """batch_size=auto: prompts as long as the longest with its answer, prefilled and cut, for all runs."""
    prompts = [p for p in prompts if not run.alone(p.most_tokens)]
    if not run.gains_by_batches or not prompts:
        return 1
    longest = max(prompts, key=lambda p: p.most_tokens)
    row = longest.ids + longest.ids[-1:] * (longest.most_tokens - len(longest.ids))

    def attempt(n: int) -> None:
        with torch.inference_mode():
            if new_caches := [r.new_cache for r in runs if r.new_cache is not None]:
                prefill_for_all(run.lm.model, new_caches, [row] * n)
            else:
                logits_of(run.lm.model, torch.tensor([row] * n, device=run.lm.device), keep=1)

    return largest_batch(attempt, run.lm.max_batch_size)


# ------------------------------------------------------------------------------------ one batch


def _generate(runs: Sequence[Run], prompts: Sequence[Prompt], contexts: Contexts) -> list[list[Text]]:
    """Answers of prompts that have the same settings, from one generate(), by run."""
    run, settings, rows = runs[0], prompts[0].settings, [p.ids for p in prompts]
    lm, watch, cache, first, every = run.lm, run.stopwatch(), None, None, len(rows) * len(runs)
    pad = lm.tokenizer.pad_token_id
    if run.new_cache is None:
        ids, mask = (t.to(lm.device) for t in left_padded(rows, pad))
    else:
        tails = Tails([p.tail for p in prompts], contexts) if run.question_first else None
        cache, ids, mask, first = start_for_all(lm.model, [r.caches(watch) for r in runs], rows, tails, pad)
        if settings.beams > 1 and cache.batch:
            cache.batch_repeat_interleave(settings.beams)
    ids = torch.where(mask.bool(), ids, ids.new_tensor([row[0] for row in rows] * len(runs))[:, None])
    width, most_new = ids.shape[1], prompts[0].most_tokens - len(rows[0])
    stops = Stops(lm.tokenizer, settings.until, settings.end_tokens, width, every, settings.beams)
    loop = {} if cache is None else by_rows(cache, settings.beams, run.decoder is not None, first)
    fast: AbstractContextManager[None] = nullcontext()
    if cache is not None and run.decoder is not None:
        fast = run.decoder.decoding(cache, most_new)
    anew = starting_anew(run.causal_lm, cache)
    with noting_first_token(run.causal_lm, watch.first_token), fast, anew:
        out = lm.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_length=width + most_new,
            stopping_criteria=StoppingCriteriaList([stops]),
            use_cache=cache is not None,
            **generate_with(cache),
            **loop,
            **{"pad_token_id": pad, **settings.of_generate},
        )
    watch.end()
    new = [stops.own(b, row) for b, row in enumerate(out[:, width:].tolist())]
    timings = None
    if len(runs) == 1:  # of several none has times of its own
        lengths = [max(1, len(row)) for row in new]
        timings = watch.timings(len(rows), run.first_of_its_kind(), lengths, out.shape[1] - width)
    caches = [None] if cache is None else cache.apart(len(runs))
    answers = []
    for m, (one, own) in enumerate(zip(runs, caches, strict=True)):
        its = new[m * len(rows) : (m + 1) * len(rows)]
        efficiency = _record(one, prompts, own, [max(0, len(row) - 1) for row in its], timings)
        known = zip(its, efficiency, strict=True)
        answers.append([Text(_text(one, row, settings), numbers, tokens=row) for row, numbers in known])
    return answers


def _record(
    run: Run,
    prompts: Sequence[Prompt],
    cache: CompressedCache | None,
    steps: Sequence[int],
    timings: list[Timing] | None,
) -> list[dict[str, Any]]:
    """Logs a batch; what the samples say of each request.

    Args:
        steps: decode steps that each answer took by itself: a batch goes on until its last row has met its stop.
    """
    members, lengths = [p.i for p in prompts], [len(p.ids) for p in prompts]
    if cache is None:
        return [r.efficiency() for r in run.record_uncached(members, lengths, timings)]
    beams = cache.batch // len(prompts)
    end = _every_row(cache.snapshot([n for n in steps for _ in range(beams)]), beams)
    found = [p.boundary for p in prompts if p.boundary is not None]
    end["answer_tokens"] = [n + 1 for n in steps]
    if timings is not None:
        end["timing"] = timings
    before = cache.prefill_end or ({**end, "compressed": [False] * len(prompts)} if found else end)
    before = {**_every_row(before, len(before["seen"]) // len(prompts)), "seen": lengths}
    return [r.efficiency() for r in run.record(members, before, end, boundaries=found or None)]


def _every_row(snapshot: dict[str, Any], step: int) -> dict[str, Any]:
    """A snapshot reduced to each step-th row."""
    return {k: v[::step] if isinstance(v, list) else v for k, v in snapshot.items()}


def _text(run: Run, tokens: list[int], settings: GenSettings) -> str:
    """An answer's text as lm-eval takes it out of its tokens."""
    lm, think = run.lm, run.lm.think_end_token
    if isinstance(think, int) and think in tokens:
        tokens = tokens[len(tokens) - tokens[::-1].index(think) :]
    text = lm.tok_decode(tokens)
    if isinstance(think, int):
        text = text.lstrip()
    return postprocess_generated_text(text, settings.until, think if isinstance(think, str) else None)
