"""What fidelity=True says of a whole evaluation, task by task: `fidelity` in lm-eval's results, and in each sample.

Numbers of all tokens together, answers that stayed the same, and documents that flipped: the full cache's answers go
through the task's own filters and metrics as the method's do.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np

from kv_lm_eval.metrics.divergence import Divergence
from kv_lm_eval.requests.beside import Beside
from kv_lm_eval.stats import curves, fidelity, mcnemar

log = logging.getLogger("lm_eval.models.kvcompressed")
Pairs = dict[str, list[tuple[float, float]]]  # of a metric, document by document: the full cache's value and ours


@dataclass
class Found:
    """What one process has of a task."""

    kind: str
    requests: list[Beside] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)  # which document each request is of
    documents: list[Divergence] = field(default_factory=list)  # of loglikelihood_rolling
    cuts: list[list[int]] = field(default_factory=list)  # tokens fed before each cut of each document
    choices: list[bool] = field(default_factory=list)  # of documents with several continuations: whether both chose one
    metrics: Pairs = field(default_factory=dict)
    noise_floor: dict[str, float] | None = None

    def take(self, other: Found) -> None:
        """Another process's part."""
        self.requests += other.requests
        self.texts += other.texts
        self.documents += other.documents
        self.cuts += other.cuts
        self.choices += other.choices
        for name, pairs in other.metrics.items():
            self.metrics.setdefault(name, []).extend(pairs)
        self.noise_floor = self.noise_floor or other.noise_floor

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        along = [one.along_base for one in self.requests] + self.documents
        out: dict[str, Any] = {"kind": self.kind, "requests": len(along), "noise_floor": self.noise_floor}
        if self.choices:
            out["same_choice"] = fmean(self.choices)
        if answers := [one for one in self.requests if one.tokens is not None and one.base_tokens is not None]:
            out["answers"] = _of_answers(answers)
            if (told := _by_evidence(answers, self.texts)) is not None:
                out["by_evidence"] = told
            own = [one.along_own for one in self.requests]
            out["along_own"] = _statistics([one for one in own if one is not None], self.texts)
        texts = self.texts or range(len(along))
        out["along_base"] = _statistics(along, texts)
        kl = [one.kl for one in along]
        out["by_position"] = curves.by_place(kl, [np.arange(len(one)) for one in kl], texts)
        if self.documents:
            out |= self._around_cuts(kl)
            return out
        binary = {name: pairs for name, pairs in self.metrics.items() if _is_binary(pairs)}
        out["flips"] = {
            name: asdict(mcnemar.flips([b == 1 for b, _ in pairs], [o == 1 for _, o in pairs]))
            for name, pairs in binary.items()
        }
        out["scores"] = {
            name: {"base": fmean(b for b, _ in pairs), "ours": fmean(o for _, o in pairs)}
            for name, pairs in self.metrics.items()
        }
        return out

    def _around_cuts(self, kl: Sequence[np.ndarray]) -> dict[str, Any]:
        """Before and after the first cut of each document, and by the distance from it and from the latest one."""
        pairs = list(zip(map(len, kl), self.cuts, strict=True))
        first, last = ([since(n, cuts) for n, cuts in pairs] for since in (curves.since_first, curves.since_last))
        late = [place >= 0 for place in first]
        before = [np.where(now, np.nan, x) for x, now in zip(kl, late, strict=True)]
        after = [np.where(now, x, np.nan) for x, now in zip(kl, late, strict=True)]
        return {
            "before_eviction": fidelity.interval(before),
            "after_eviction": fidelity.interval(after),
            "by_distance": curves.by_place(kl, first),
            "since_latest_cut": curves.by_place(kl, last),
        }


def add(lm: Any, tasks: Any, results: Any) -> None:
    """Adds `fidelity` to an evaluation's results; called in every process, of which one has results."""
    every = dict(_tasks(tasks))
    asked = [getattr(lm, "engine", None), *(getattr(task, "reading", None) for task in every.values())]
    if not any(getattr(one, "fidelity", None) for one in asked):
        return
    found = {name: one for name, task in every.items() if (one := _found(task))}
    if lm.world_size > 1:
        parts = lm.gather_object(found) or []
        found = {}
        for part in parts:
            for name, one in part.items():
                found[name].take(one) if name in found else found.update({name: one})
    if isinstance(results, dict) and found:
        results["fidelity"] = {name: one.summary() for name, one in found.items()}


def of_sample(answers: list[list[Any]]) -> list[dict[str, Any]]:
    """A sample's field: one entry a request, of repeats the first."""
    return [b.of_sample() for repeats in answers if repeats and (b := getattr(repeats[0], "beside", None)) is not None]


def _tasks(given: Any) -> Iterator[tuple[str, Any]]:
    """lm-eval's tasks by name: it has had several ways to hand them over."""
    if isinstance(given, Mapping):
        for name, value in (given["tasks"] if "tasks" in given else given).items():
            if hasattr(value, "instances") and hasattr(value, "process_results"):
                yield str(name), value
            else:
                yield from _tasks(value)


def _found(task: Any) -> Found | None:
    instances = [one for one in task.instances if one.resps]
    answers = [one.resps[0] for one in instances]
    if not instances:
        return None
    out = Found(instances[0].request_type)
    records: list[Any] = [r for a in answers if getattr(r := getattr(a, "record", None), "kl", None) is not None]
    if records:
        out.documents = [Divergence(r.kl, r.base_log_probs, r.log_probs, r.same_top) for r in records]
        out.cuts = [[fed for fed, _ in r.evictions] for r in records]
        out.noise_floor = records[0].noise_floor
        return out
    compared = [b for a in answers if isinstance(b := getattr(a, "beside", None), Beside)]
    if len(compared) < len(answers):
        return None
    out.requests, out.texts = compared, [one.doc_id for one in instances]
    out.noise_floor = next((one.noise_floor for one in compared if one.noise_floor), None)
    out.choices = _choices(instances, answers)
    try:
        out.metrics = _metrics(task, instances)
    except Exception as error:  # of a task's own code: what was evaluated must not be lost to it
        log.warning("fidelity: the full cache's answers could not be scored by %s: %r", task.config.task, error)
    return out


def _choices(instances: Sequence[Any], answers: Sequence[Any]) -> list[bool]:
    """Of each document that has several continuations of one context, whether both find the same one most likely."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for one, answer in zip(instances, answers, strict=True):
        if isinstance(answer, tuple):
            groups[one.doc_id, one.args[0]].append(answer)
    several = [group for group in groups.values() if len(group) > 1]
    return [
        int(np.argmax([a[0] for a in group])) == int(np.argmax([a.beside.base[0] for a in group])) for group in several
    ]


def _metrics(task: Any, instances: Sequence[Any]) -> Pairs:
    """Each metric that is one number a document, for the full cache's answers and for ours."""
    twins = []
    for one in instances:
        twin = copy.copy(one)
        twin.resps = [_as_answer(one.resps[0])] * len(one.resps)
        twin.filtered_resps = {}
        twins.append(twin)
    for ensemble in task._filters:
        ensemble.apply(twins)
    documents: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(instances)), key=lambda i: instances[i].idx):
        documents[instances[i].doc_id].append(i)
    out: Pairs = defaultdict(list)
    for key in instances[0].filtered_resps:
        for members in documents.values():
            doc = instances[members[0]].doc
            base, ours = (
                task.process_results(copy.copy(doc), [side[i].filtered_resps[key] for i in members])
                for side in (twins, instances)
            )
            for name in base:
                if _is_number(base[name]) and _is_number(ours.get(name)):
                    out[f"{name},{key}"].append((float(base[name]), float(ours[name])))
    return dict(out)


def _as_answer(ours: Any) -> Any:
    """The full cache's answer as the model would have given it."""
    return type(ours)(ours.beside.base)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number))


def _is_binary(pairs: Sequence[tuple[float, float]]) -> bool:
    return bool(pairs) and all(value in (0, 1) for pair in pairs for value in pair)


def _by_evidence(answers: Sequence[Beside], texts: Sequence[int]) -> dict[str, Any] | None:
    """Mean KL, along the full cache's answers, of the tokens that repeat what the prompt says: where more than half of
    its pairs are kept, where fewer are, and of all other tokens; None where no answer repeats anything."""
    if not any(one.evidence for one in answers):
        return None
    values: dict[str, list[np.ndarray]] = {"kept": [], "evicted": [], "other": []}
    shares: dict[str, list[float]] = {"kept": [], "evicted": []}
    for one in answers:
        kl = one.along_base.kl.astype(np.float64)
        of_token = np.full(len(kl), np.nan)
        for start, stop, kept in one.evidence:
            of_token[start:stop] = kept
            shares["kept" if kept > 0.5 else "evicted"].append(kept)
        values["kept"].append(np.where(of_token > 0.5, kl, np.nan))
        values["evicted"].append(np.where(of_token <= 0.5, kl, np.nan))
        values["other"].append(np.where(np.isnan(of_token), kl, np.nan))
    out: dict[str, Any] = {}
    for name, parts in values.items():
        found = fidelity.interval(parts, list(texts))
        out[name] = {"tokens": int(sum(np.isfinite(p).sum() for p in parts))}
        out[name] |= {end: found[end] for end in ("mean", "low", "high")}
        if of := shares.get(name):
            out[name] |= {"facts": len(of), "kept_share": fmean(of)}
    return out


def _of_answers(answers: Sequence[Beside]) -> dict[str, Any]:
    apart = [one.first_divergence for one in answers if one.first_divergence is not None]
    return {
        "identical": fmean(one.identical for one in answers),
        "first_divergence_median": median(apart) if apart else None,
        "tokens_mean": fmean(len(one.tokens) for one in answers if one.tokens is not None),
        "base_tokens_mean": fmean(len(one.base_tokens) for one in answers if one.base_tokens is not None),
    }


def _statistics(along: Sequence[Divergence], texts: Sequence[int]) -> dict[str, Any] | None:
    """llama.cpp's statistics of all tokens, and the interval over documents; None of no token."""
    held = [one for one in along if len(one)]
    if not held:
        return None
    arrays = (np.concatenate([getattr(d, n) for d in held]) for n in ("kl", "base_log_probs", "log_probs", "same_top"))
    interval = fidelity.interval([one.kl for one in along], list(texts))
    return {**fidelity.as_plain(fidelity.of_tokens(*arrays)), "kl_low": interval["low"], "kl_high": interval["high"]}
