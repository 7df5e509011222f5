"""How choices are scored: lm-eval's `loglikelihood` requests, each distinct context prefilled once for all of its
continuations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine import recompute
from kv_lm_eval.engine.choices import How, Score, score_for_all
from kv_lm_eval.engine.question import Contexts, Tails
from kv_lm_eval.engine.windows import Plain
from kv_lm_eval.errors import UserError
from kv_lm_eval.metrics.latency import Stopwatch
from kv_lm_eval.progress import Bar
from kv_lm_eval.requests import boundaries, fidelity
from kv_lm_eval.requests.beside import Beside
from kv_lm_eval.requests.boundaries import Boundary
from kv_lm_eval.requests.halving import largest_batch
from kv_lm_eval.requests.others import Others
from kv_lm_eval.requests.run import Run
from kv_lm_eval.requests.samples import Choice

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # lm-eval's: texts, context, continuation


@dataclass(frozen=True)
class Group:
    """One prefill: requests of one context, and of one question in it where that is fed after the compression."""

    context: tuple[int, ...]
    boundary: Boundary | None
    members: list[int]
    tokens: int  # with the longest of its continuations

    @property
    def head(self) -> tuple[int, ...]:
        """What is compressed before the question is seen; nothing where it is compressed with it."""
        return self.context[: max(0, len(self.context) - self.boundary.tail_tokens)] if self.boundary else ()


def encode(run: Run, disable_tqdm: bool, of_pair: Callable[[str, str], tuple[list[int], list[int]]]) -> list[Encoded]:
    """Tokens of contexts and continuations, by lm-eval's rules.

    A context of blanks is none: its blanks belong to the continuation, as any at a context's end, and what is left is
    lm-eval's empty context, its prefix token.

    Args:
        of_pair: lm-eval's own: tokens of a context that is not empty and of its continuation.
    """
    lm, encoded = run.lm, list[Encoded]()
    for request in Bar(run.requests, desc="Tokenizing inputs", disable=run.hidden(disable_tqdm)):
        context, continuation = request.args
        context_ids, ids = of_pair(context, continuation) if context else ([], [])
        if not context_ids:
            ids = ids or lm.tok_encode(continuation, add_special_tokens=False)
            context_ids = [lm.prefix_token_id]
            if ids[:1] == context_ids:
                context_ids, ids = ids[:1], ids[1:]
        encoded.append(((context, continuation), context_ids, ids))
    return encoded


def score(
    run: Run,
    requests: list[Encoded],
    disable_tqdm: bool,
    stock: Callable[..., list[Score]],
    beside: Sequence[Run] = (),
) -> list[Choice]:
    """Answers of all requests, in their order.

    Args:
        requests: encoded; parallel to the run's where those are known.
        stock: lm-eval's own scoring, for method=no_cache.
        beside: the same requests under other compressions, answered on the way where they can be.
    """
    for i, (texts, _, ids) in enumerate(requests):
        if not ids:
            raise UserError(
                f"{_choice(run, i)} has a continuation of no tokens ({texts}): its log-likelihood would be 0, and it "
                "would win against every other. Give every choice a text of its own"
            )
    most = run.lm.max_length + 1
    run.check_prompts([len(context) + len(ids) for _, context, ids in requests], [most] * len(requests))
    groups = _groups(run, requests)
    if run.compression.method.uses_cache:
        return _score_groups(Others(run, beside), requests, groups, disable_tqdm)
    known: dict[int, dict[str, Any]] = {}
    for group in groups:
        names = run.by_task(group.members)
        own = list(dict.fromkeys(names.values()))
        records = run.record_uncached(own, [len(requests[group.members[-1]][1])] * len(own))
        by_name = {i: record.efficiency() for i, record in zip(own, records, strict=True)}
        known.update({i: by_name[names[i]] for i in group.members})
    if (length := run.compression.method.recomputed_tokens) is not None:
        scores = _recompute(run, requests, length, disable_tqdm)
    else:
        scores = stock(requests, disable_tqdm=disable_tqdm)
    return [Choice(one, known[i]) for i, one in enumerate(scores)]


def _choice(run: Run, i: int) -> str:
    return f"choice {run.requests[i].idx} of {run.called(i)}" if i < len(run.requests) else run.called(i)


def _groups(run: Run, requests: list[Encoded]) -> list[Group]:
    """Requests by context and question, longest first."""
    most = run.lm.max_length + 1
    found: list[Boundary | None] = [None] * len(requests)
    if run.question_first and run.requests:
        found = boundaries.find_all(run.requests, run.engine.question_field, run.tokens_from, run.called)
    members: dict[tuple[tuple[int, ...], Boundary | None], list[int]] = defaultdict(list)
    for i, (_, context, ids) in enumerate(requests):
        kept = tuple(context[-(most - len(ids)) :]) if len(ids) < most else ()
        if not kept and run.compression.method.uses_cache:
            raise UserError(
                f"{_choice(run, i)} has no room for any context: its continuation alone has {len(ids)} tokens, the "
                f"model's maximum is {run.lm.max_length}"
            )
        members[kept, _tail(run, i, kept, found[i])].append(i)
    groups = [
        Group(context, boundary, of_it, len(context) + max(len(requests[i][2]) for i in of_it))
        for (context, boundary), of_it in members.items()
    ]
    return sorted(groups, key=lambda g: (-len(g.head), g.head, -len(g.context), g.context))


def _tail(run: Run, i: int, context: Sequence[int], found: Boundary | None) -> Boundary | None:
    """With the question after the compression: what is fed then, at least `tail_tokens`."""
    if not run.question_first:
        return None
    if found is None:  # no context, or one that only the tokens are known of
        return Boundary(max(1, run.engine.tail_tokens), True)
    boundaries.check(len(context), found, run.called(i))
    return replace(found, tail_tokens=max(found.tail_tokens, run.engine.tail_tokens))


def _recompute(run: Run, requests: list[Encoded], length: int, disable_tqdm: bool) -> list[Score]:
    """Every token of every continuation from a fresh forward over the `length` tokens before it."""
    lm = run.lm
    total = sum(len(r[2]) for r in requests)
    desc = "kvcompressed recomputed windows"
    with Bar(total=total, unit="tok", disable=run.hidden(disable_tqdm), desc=desc) as bar:
        scores = recompute.score_recomputed(
            Plain(run.last_logits, run.batch_size or 1, lm.device, lm.softmax_dtype),
            [r[1] for r in requests],
            [r[2] for r in requests],
            length,
            bar.update,
        )
    for i, one in enumerate(scores):
        run.keep(i, one, None)
    return scores


class Scored(NamedTuple):
    """A batch of groups under one run: scores by group and continuation, the cache, what the full cache says beside
    (with fidelity=True), and the watch where the batch was the run's alone."""

    scores: list[list[Score]]
    cache: CompressedCache
    beside: list[list[Beside]] | None
    watch: Stopwatch | None


def _score_groups(others: Others, requests: list[Encoded], groups: list[Group], disable_tqdm: bool) -> list[Choice]:
    run = others.runs[0]

    def batch_for(runs: Sequence[Run], batch: Sequence[Group]) -> list[Scored]:
        watch = run.stopwatch()
        continuations = [[requests[i][2] for i in g.members] for g in batch]
        asked = [g.boundary.tail_tokens for g in batch if g.boundary is not None]
        tails = Tails(asked, heads) if asked else run.engine.tail_tokens
        contexts, new_caches = [g.context for g in batch], [r.caches(watch) for r in runs]
        if len(runs) > 1:
            how = How(run.lm.softmax_dtype)
            found = score_for_all(run.lm.model, new_caches, contexts, continuations, tails, how)
            return [Scored(*one, None, None) for one in found]
        scores, cache, beside = fidelity.score_choices(run, floor, new_caches[0], contexts, continuations, tails)
        watch.end()
        return [Scored(scores, cache, beside, None if beside else watch)]

    def work(batch: Sequence[Group]) -> list[tuple[Run, Scored]]:
        return others.served(len(batch), lambda runs: batch_for(runs, batch))

    answers: dict[int, Choice] = {
        i: kept for g in groups for i in g.members if (kept := run.kept(i, g.boundary)) is not None
    }
    rest = (replace(g, members=[i for i in g.members if i not in answers]) for g in groups)
    groups = [group for group in rest if group.members]
    heads = Contexts(group.head for group in groups)
    floor = fidelity.floor_of(run, [group.context for group in groups], [group.tokens for group in groups])
    todo = len(requests) - len(answers)
    with Bar(total=todo, disable=run.hidden(disable_tqdm), desc="kvcompressed loglikelihood") as bar:
        for batch in _batches(run, groups, work):
            for part, result in run.halving.run(batch, work, lambda g: len(g.context)):
                assert result is not None
                for one, scored in reversed(result):  # the run's own last: what it keeps, all have
                    found = _choices(one, part, scored)
                    for group in part:
                        for i in group.members:
                            one.keep(i, found[i], group.boundary)
                answers |= found
                bar.update(sum(len(group.members) for group in part))
    return [answers[i] for i in range(len(requests))]


def _choices(run: Run, batch: Sequence[Group], scored: Scored) -> dict[int, Choice]:
    """A batch's answers, by request."""
    known = _record(run, batch, scored.cache, scored.watch)
    return {
        i: Choice(scored.scores[b][at], known[i], scored.beside[b][at] if scored.beside else None)
        for b, group in enumerate(batch)
        for at, i in enumerate(group.members)
    }


def _batches(run: Run, groups: list[Group], work: Callable[[Sequence[Group]], object]) -> list[list[Group]]:
    alone, together = list[Group](), list[Group]()
    for group in groups:
        (alone if run.alone(group.tokens) else together).append(group)
    size = run.batch_size
    if size is None:
        size = 1
        if run.gains_by_batches and together:
            size = largest_batch(lambda n: work(together[:1] * n), min(run.lm.max_batch_size, len(together)))
    return [*([group] for group in alone), *(together[at : at + size] for at in range(0, len(together), size))]


def _record(
    run: Run, batch: Sequence[Group], cache: CompressedCache, watch: Stopwatch | None
) -> dict[int, dict[str, Any]]:
    """Logs a batch; what the samples say of each request. No times where there is no watch."""
    names = [run.by_task(group.members) for group in batch]
    own = [(row, i) for row, of_group in enumerate(names) for i in dict.fromkeys(of_group.values())]
    end = cache.snapshot()
    none_cut = [False] * len(batch)
    before = cache.prefill_end or ({**end, "compressed": none_cut} if run.question_first else end)
    if watch is not None:
        end["timing"] = watch.timings(len(batch), run.first_of_its_kind())
    found = [group.boundary for group in batch if group.boundary is not None]
    records = run.record(
        [i for _, i in own],
        {**before, "seen": [len(group.context) for group in batch]},
        end,
        [row for row, _ in own],
        found or None,
    )
    known = {(row, i): record.efficiency() for (row, i), record in zip(own, records, strict=True)}
    return {i: known[row, name] for row, of_group in enumerate(names) for i, name in of_group.items()}
