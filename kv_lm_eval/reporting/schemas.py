"""What the files of a report must hold to be believed: lm-eval's results and samples, a sweep's plan and points.

Keys that a report does not read may hold anything. `None` stands wherever the writer may have had no number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from typing_extensions import NotRequired, TypedDict

OPEN = pydantic.with_config(extra="allow")
Name = Annotated[str, pydantic.Field(min_length=1)]
Count = Annotated[int, pydantic.Field(ge=0)]
Share = Annotated[float, pydantic.Field(ge=0, le=1 + 1e-9)]
Size = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Date = Annotated[float, pydantic.Field(ge=0, lt=253_402_300_800)]  # seconds since 1970, before the year 10000


def _seconds(value: str) -> str:
    """lm-eval writes the seconds of a run as a text."""
    if not 0 <= float(value) < float("inf"):
        raise ValueError("should be a number of seconds")
    return value


@OPEN
class Spread(TypedDict):
    """A measured number over the requests that have it."""

    median: float | None
    p10: float | None
    p90: float | None
    n: Count


def _of_something(spread: Spread) -> Spread:
    if {spread[name] is None for name in ("median", "p10", "p90")} != {spread["n"] == 0}:
        raise ValueError("should have numbers where n is above 0, and none where it is 0")
    return spread


Measured = Annotated[Spread, pydantic.AfterValidator(_of_something)]


@OPEN
class Efficiency(TypedDict):
    """Times and peaks of memory."""

    ttft_s: Measured
    tpot_s: Measured
    tokens_per_s: Measured
    prefill_peak_bytes: Measured
    decode_peak_bytes: Measured


@OPEN
class TaskStats(TypedDict):
    """What compression did to the requests of a task."""

    requests: Count
    compressed_share: Share | None
    kept_fraction_mean: Size | None
    kv_bytes_prefill_mean: Size | None
    kv_bytes_decode_mean: Size | None
    kv_bytes_allocated_mean: Size | None
    overhead_bytes_mean: Size | None
    efficiency: NotRequired[Efficiency]


@OPEN
class RunStats(TaskStats):
    """The same of a whole run."""

    by_task: dict[str, TaskStats]


@OPEN
class NoStats(TypedDict):
    """Of a run whose requests were all answered before."""

    requests: Literal[0]


@OPEN
class Compression(TypedDict):
    """A method and its settings after defaults."""

    method: Name


@OPEN
class Config(TypedDict):
    """lm-eval's `config`, with what our model adds."""

    model: Name
    model_args: dict[str, Any] | str | None
    kv_compression: NotRequired[Compression]
    kv_stats: NotRequired[dict[str, Any]]  # RunStats or NoStats
    kv_versions: NotRequired[dict[str, Any]]
    kv_format: NotRequired[Count]  # 0 where it is missing
    limit: NotRequired[float | None]
    gen_kwargs: NotRequired[dict[str, Any] | str | None]


@OPEN
class Documents(TypedDict):
    """How many documents a task has and how many were asked."""

    effective: Count


@OPEN
class Fidelity(TypedDict):
    """How far a task's predictions are from the full cache's (requests/verdicts.py)."""

    requests: Count
    along_base: dict[str, float | None] | None
    noise_floor: dict[str, Size] | None
    by_position: NotRequired[list[dict[str, float | None]]]
    by_distance: NotRequired[list[dict[str, float | None]]]
    by_evidence: NotRequired[dict[str, dict[str, float | None]]]
    flips: NotRequired[dict[str, dict[str, Size]]]
    answers: NotRequired[dict[str, float | None]]


@OPEN
class Token(TypedDict):
    """A token that came, and the likeliest ones with their probabilities."""

    text: str
    kl: Size | None
    p_base: Share
    p: Share
    top_base: list[list[str | float]]
    top: list[list[str | float]]


@OPEN
class View(TypedDict):
    """A stretch of one sample, token by token against the full cache."""

    start: Count
    tokens: list[Token]


Results = TypedDict(
    "Results",
    {
        "results": dict[str, dict[str, Any]],
        "config": Config,
        "group_subtasks": NotRequired[dict[str, list[Name]]],
        "configs": NotRequired[dict[str, dict[str, Any]]],
        "versions": NotRequired[dict[str, str | float | None]],
        "n-shot": NotRequired[dict[str, Count | None]],
        "higher_is_better": NotRequired[dict[str, dict[str, bool | None]]],
        "n-samples": NotRequired[dict[str, Documents]],
        "date": NotRequired[Date],
        "task_hashes": NotRequired[dict[str, str]],
        "model_name": NotRequired[str],
        "chat_template": NotRequired[str | dict[str, str] | None],
        "system_instruction": NotRequired[str | None],
        "fewshot_as_multiturn": NotRequired[bool | None],
        "lm_eval_version": NotRequired[Any],
        "transformers_version": NotRequired[Any],
        "fidelity": NotRequired[dict[str, Fidelity]],
        "total_evaluation_time_seconds": NotRequired[Annotated[str, pydantic.AfterValidator(_seconds)]],
    },
)
OPEN(Results)
# What lm-eval always writes, beside what no report can do without: a file that lacks one is from another version.
ALWAYS = sorted(Results.__optional_keys__ - {"configs", "transformers_version", "fewshot_as_multiturn", "fidelity"})


@OPEN
class Point(TypedDict):
    """A point of a sweep as planned."""

    id: Name
    name: str
    model: Name
    method: str
    settings: dict[str, Any]
    model_args: dict[str, Any]
    tasks: Annotated[list[Name], pydantic.Field(min_length=1)]
    metadata: NotRequired[dict[str, Any] | None]
    gen_kwargs: NotRequired[dict[str, Any] | str | None]
    num_fewshot: NotRequired[int | None]
    limit: NotRequired[float | None]
    seed: NotRequired[int | list[int | None] | None]
    apply_chat_template: NotRequired[bool | str | None]
    fewshot_as_multiturn: NotRequired[bool | None]
    system_instruction: NotRequired[str | None]
    include_path: NotRequired[str | None]


@OPEN
class Record(Point):
    """What became of a point."""

    status: Literal["done", "failed", "out_of_memory", "running"]
    error: str | None
    results_file: str | None


@OPEN
class Plan(TypedDict):
    """A sweep's plan."""

    name: str
    points: Annotated[list[Point], pydantic.Field(min_length=1)]


@OPEN
class Answer(TypedDict):
    """A line of a samples file."""

    doc_id: int
    doc: Any
    target: Any
    arguments: dict[str, dict[str, Any]]
    resps: list[Any]
    filtered_resps: list[Any]
    filter: str
    metrics: list[str]
    doc_hash: Name
    prompt_hash: Name
    target_hash: Name
