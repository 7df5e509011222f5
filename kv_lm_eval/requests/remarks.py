"""What is said of a run beside its numbers: at its start, settings that do less than they seem to; at its end, what was
compressed, how long it took, and where nothing was compressed at all."""

from __future__ import annotations

from typing import Any

from kv_lm_eval import versions
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.requests.run import Run, log

LONG_ANSWER = 200  # tokens: from here on the length of answers is told


def at_start(run: Run) -> None:
    """When the model is loaded and has passed its check."""
    found = run.compression.warnings(run.facts) if run.facts is not None else []
    for message in [*found, *run.engine.warnings(run.compression)]:
        log.warning(message)
    if run.compression.lossy and run.engine.tail_tokens == 0:
        log.warning(
            "tail_tokens=0: the first token of every continuation is scored from the uncompressed prompt, so one-token "
            "choices will show exactly no effect of a compression after the prefill"
        )
    if untried := versions.in_use().get("untried"):
        log.warning("%s: the self-check has passed, the tests have not been run with it", untried)
    log.info("kvcompressed: %s on %s", run.settings, run.name)


def at_end(compression: Compression, summary: dict[str, Any]) -> None:
    """A line or two for the run, and a warning for each task whose requests were all too short to be compressed."""
    if not summary["requests"]:
        log.warning("all answers came from the request cache: there are no numbers on memory or compression")
        return
    log.info(
        "%s: %.0f %% of %d requests compressed, %.0f %% of pairs kept at their end, %.0f KiB of keys and values after "
        "the prefill on average",
        compression.method.name,
        100 * summary["compressed_share"],
        summary["requests"],
        100 * summary["kept_fraction_mean"],
        summary["kv_bytes_prefill_mean"] / 1024,
    )
    if "efficiency" in summary:
        log.info("%s: %s", compression.method.name, times(summary["efficiency"]))
    if summary.get("empty_questions"):
        log.info(
            "question_in_prompt=False: %d of %d requests have no question of their own: what follows their context was "
            "fed after the compression",
            summary["empty_questions"],
            summary["requests"],
        )
    for task, one in summary["by_task"].items():
        if share := one.get("context_share"):
            log.info(
                "%s: question_in_prompt=False, and %.1f to %.1f %% of a prompt (median %.1f %%) stand before its "
                "question and are compressed",
                task or "this run",
                *(100 * share[key] for key in ("min", "max", "median")),
            )
        asked = one.get("question_tokens")
        if asked and 2 * asked["median"] > one["prompt_tokens"]["median"]:
            log.warning(
                "%s: question_in_prompt=False, and its questions with what follows (median %d tokens) are over half "
                "of its prompts (median %d): little is compressed before they are seen",
                task or "this run",
                asked["median"],
                one["prompt_tokens"]["median"],
            )
        if (answers := one.get("answer_tokens")) and answers["median"] >= LONG_ANSWER:
            log.info("%s: %s", task or "this run", answer_lengths(one))
    limits = ("max_capacity_prompt", "keep_ratio", "threshold", "prune_after", "residual_length")
    budget = {k: v for k, v in compression.settings().items() if k in limits}
    if summary["over_budget"]:
        log.warning(
            "%s: %d of %d requests kept what always stays and nothing else: their share of %s is no more than its %d "
            "slots, so they kept as much as that or more than was asked (kv_stats.over_budget counts them). Lower what "
            "the method always keeps, or raise the share.",
            compression.method.name,
            summary["over_budget"],
            summary["requests"],
            budget,
            max(compression.method.protected, compression.budget.least),
        )
    for task, one in summary["by_task"].items():
        if compression.lossy and one["compressed_share"] == 0:
            lengths = one["prompt_tokens"]
            log.warning(
                "%s: compression triggered in NONE of %d requests, so its score is the full cache's: prompts have %d "
                "to %d tokens (median %d), the budget is %s. Take longer prompts (more few-shot examples) or a smaller "
                "budget.",
                task or "this run",
                one["requests"],
                lengths["min"],
                lengths["max"],
                lengths["median"],
                budget,
            )


def answer_lengths(stats: dict[str, Any]) -> str:
    """What is said of answers so long that their length is a result."""
    answers, mean = stats["answer_tokens"], stats["answer_tokens_mean"]
    said = (
        f"answers of {mean:.0f} tokens on average, {answers['min']} to {answers['max']} (median {answers['median']:g})"
    )
    if answers["longest"] > 1:
        said += (
            f"; {answers['longest']} of {stats['requests']} have all {answers['max']}, as answers have that a limit "
            "ends and not their own stop"
        )
    return said


def times(efficiency: dict[str, Any]) -> str:
    """Medians with the number of requests behind each."""

    def median(name: str, unit: str, scale: float, word: str) -> str:
        one = efficiency[name]
        return f"{word} N/A" if not one["n"] else f"{word} {one['median'] * scale:.4g} {unit} (n={one['n']})"

    parts = [
        median("ttft_s", "ms", 1e3, "median time to first token"),
        median("tpot_s", "ms", 1e3, "per further token"),
        median("tokens_per_s", "tokens/s", 1, "throughput"),
        median("prefill_peak_bytes", "MiB", 2**-20, "prefill peak above the weights"),
        median("decode_peak_bytes", "MiB", 2**-20, "decode peak"),
    ]
    if not efficiency["ttft_s"]["n"]:  # nothing was generated
        parts = [median("total_s", "ms", 1e3, "median time of a batch"), parts[3]]
    warm_up = efficiency["warm_up_requests"]
    return ", ".join(parts) + (f"; {warm_up} warm-up requests left out" if warm_up else "")
