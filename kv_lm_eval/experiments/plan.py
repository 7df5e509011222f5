"""A sweep's YAML file to a plan: every point with its full configuration, a name for tables and a hash.

The file has `models`, `tasks` and `methods`, whose product is run, and `points`, listed one by one. A list in an entry
is an axis of its grid; `${name}` refers to another setting of the same point or to `vars` (references.py);
`${here}` is the folder of the file.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from kv_lm_eval import files, harness, identity, plugin, presets
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.experiments import task_files
from kv_lm_eval.experiments.references import calculate, names_in, resolve
from kv_lm_eval.methods import names

TOP_KEYS = ("name", "description", "vars", "defaults", "models", "tasks", "methods", "points")
# lm-eval's own options; every other key of an entry goes into --model_args
DECIDING_KEYS = (  # they decide a number
    "model",
    "tasks",
    "num_fewshot",
    "limit",
    "gen_kwargs",
    "metadata",
    "device",
    "seed",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "include_path",
)
OTHER_KEYS = ("batch_size", "max_batch_size", "bootstrap_iters", "confirm_run_unsafe_code")
RUN_DEFAULTS: dict[str, Any] = {"model": "kvcompressed", "batch_size": 1, "bootstrap_iters": 1000}
WORDS = ("name", "where", "label")  # about the entry itself

Point = dict[str, Any]
TaskFiles = dict[Any, dict[str, Any]]  # by tasks and folder
Count = Annotated[int, Field(ge=1)]


class Options(TypedDict, total=False):
    """Types of lm-eval's options in an entry; limit is checked as --limit is."""

    model: str
    tasks: list[str]
    num_fewshot: Annotated[int, Field(ge=0)] | None
    gen_kwargs: dict[str, Any] | str | None
    metadata: dict[str, Any] | None
    device: str | None
    seed: int | Annotated[list[int | None], Field(min_length=4, max_length=4)] | None
    apply_chat_template: bool | str | None
    fewshot_as_multiturn: bool | None
    system_instruction: str | None
    include_path: str | None
    batch_size: Count | Annotated[str, Field(pattern=r"^(auto(:\d+)?|[1-9]\d*)$")] | None
    max_batch_size: Count | None
    bootstrap_iters: Annotated[int, Field(ge=0)] | None
    confirm_run_unsafe_code: bool | None


def load(file: Path, overrides: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], list[Point]]:
    """The configuration of a YAML file and its points; `overrides` replace `defaults` and `vars` of the same name."""
    if not file.exists():
        raise UserError(f"{file}: there is no such file; the shipped ones are in scripts/configs/")
    config = files.read_yaml(file)
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a mapping with tasks, methods, ..., it holds {type(config).__name__}")
    config = files.check(config, dict[str, Any], str(file))
    config.setdefault("name", file.stem)
    config["vars"] = {**_mapping(config.get("vars"), "`vars`"), "here": str(file.resolve().parent)}
    for key, value in (overrides or {}).items():
        part = "vars" if key in config["vars"] else "defaults"
        config[part] = {**_mapping(config.get(part), f"`{part}`"), key: value}
    try:
        _check_names(config)
        return config, points(config)
    except RecursionError:
        raise UserError(f"{file}: a value holds itself") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _check_names(config: Mapping[str, Any]) -> None:
    """Methods that are named outright, before torch is imported for the points."""
    defaults = {**RUN_DEFAULTS, **_mapping(config.get("defaults"), "`defaults`")}
    for entry in [*_entries(config, "methods"), *_entries(config, "points")]:
        flat = {**defaults, **entry}
        asked = flat["method"] if isinstance(flat.get("method"), list) else [flat.get("method")]
        for method in asked if flat["model"] == plugin.MODEL_NAME else ():
            if isinstance(method, str) and "$" not in method:
                names.check(method)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    return files.check({} if value is None else value, dict[str, Any], what)


def points(config: Mapping[str, Any]) -> list[Point]:
    """All points of a configuration in its order, equal ones once.

    Raises:
        UserError: an unknown key, a missing part, a reference that leads nowhere.
    """
    if unknown := [key for key in config if key not in TOP_KEYS]:
        raise UserError(f"unknown key {unknown[0]!r}{close_names(str(unknown[0]), TOP_KEYS)}: {', '.join(TOP_KEYS)}")
    if hidden := [key for key in _mapping(config.get("vars"), "`vars`") if key in RUN_DEFAULTS]:
        raise UserError(
            f"`vars`: {hidden[0]} is an option that every point has ({RUN_DEFAULTS[hidden[0]]!r} where none is given), "
            f"and ${{{hidden[0]}}} would be that; give the variable another name"
        )
    models, tasks = _models(config), _tasks(config)
    methods = _entries(config, "methods")
    listed = _entries(config, "points")
    if not methods and not listed:
        raise UserError("nothing to run: give `methods` (a grid) or `points` (a list)")
    found: dict[str, Point] = {}
    of_tasks: TaskFiles = {}
    for entry, grid in [*((m, True) for m in methods), *((p, False) for p in listed)]:
        own_models = models if "pretrained" not in entry else [{}]
        own_tasks = tasks if "tasks" not in entry else [{}]
        if not own_models or not own_tasks:
            raise UserError(f"{_shown(entry)} has no {'tasks' if own_models else 'model'}: give `tasks` and `models`")
        for model, task in itertools.product(own_models, own_tasks):
            for point in _expand(config, model, task, entry, grid, of_tasks):
                found.setdefault(point["hash"], point)
    _name(list(found.values()))
    return list(found.values())


def _entries(config: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = config.get(key) or []
    if not isinstance(entries, list):
        raise UserError(f"`{key}` must be a list, got {type(entries).__name__}")
    out = []
    for entry in entries:
        entry = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise UserError(f"`{key}`: {entry!r} must be a mapping (method: NAME and its settings) or a method's name")
        out.append(_mapping(entry, f"`{key}`"))
    return out


def _models(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    models = config.get("models") or []
    models = models if isinstance(models, list) else [models]
    return [{"pretrained": model} if isinstance(model, str) else _mapping(model, "`models`") for model in models]


def _tasks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Names share one run; a mapping is a run of its own, with its own metadata, limit and so on."""
    tasks = config.get("tasks") or []
    tasks = tasks if isinstance(tasks, list) else [tasks]
    names = [task for task in tasks if isinstance(task, str)]
    own = [_mapping(task, "`tasks`") for task in tasks if not isinstance(task, str)]
    if wrong := [task for task in own if "tasks" not in task]:
        raise UserError(f"`tasks`: {wrong[0]!r} is a run of its own and needs `tasks: [NAME, ...]`")
    return [*([{"tasks": names}] if names else []), *own]


def _expand(
    config: Mapping[str, Any],
    model: dict[str, Any],
    task: dict[str, Any],
    entry: dict[str, Any],
    grid: bool,
    of_tasks: TaskFiles,
) -> Iterator[Point]:
    """The points of one entry for one model and one task run."""
    variables = _mapping(config.get("vars"), "`vars`")
    flat = {**RUN_DEFAULTS, **_mapping(config.get("defaults"), "`defaults`"), **model, **task, **entry}
    axes = {k: v for k, v in flat.items() if grid and isinstance(v, list) and k not in ("tasks", "seed")}
    axes.update({k: variables[k] for k in _used(flat, variables) if isinstance(variables[k], list) and k not in flat})
    if empty := [k for k, v in axes.items() if not v]:
        raise UserError(f"{_shown(entry)}: {empty[0]} is an empty list, so there is nothing to run")
    for combination in itertools.product(*axes.values()):
        scope = {**variables, **flat, **dict(zip(axes, combination, strict=True))}
        try:
            full = {key: resolve(scope[key], scope, (key,), key not in ("name", "label")) for key in flat}
        except UserError as error:
            raise UserError(f"{_shown(entry)}: {error}") from error
        if "where" in full and not _holds(full["where"], entry):
            continue
        varying = {k for k in entry if k in axes or any(a in axes for a in _used({k: entry[k]}, variables))}
        yield _point(full, entry, [k for k in entry if k in varying and k not in WORDS], of_tasks)


def _used(values: Mapping[str, Any], variables: Mapping[str, Any]) -> list[str]:
    """The variables that values refer to, also through others."""
    seen: list[str] = []
    todo = sorted(set().union(*map(names_in, values.values())))
    while todo:
        name = todo.pop(0)
        if name in variables and name not in seen:
            seen.append(name)
            todo += sorted(names_in(variables[name]))
    return [name for name in variables if name in seen]


def _holds(where: Any, entry: Mapping[str, Any]) -> bool:
    if isinstance(where, str):
        try:
            where = calculate(where)
        except ValueError:
            raise UserError(f"{_shown(entry)}: where: {where!r} is no comparison of numbers") from None
    return bool(where)


def _point(full: dict[str, Any], entry: Mapping[str, Any], axes: list[str], of_tasks: TaskFiles) -> Point:
    run_keys = {*DECIDING_KEYS, *OTHER_KEYS, *WORDS}
    model_args = {key: value for key, value in full.items() if key not in run_keys and value is not None}
    settings = {k: full[k] for k in entry if k in model_args and k not in ("method", "pretrained")}
    for own in (model_args, settings):  # `seed` is lm-eval's option
        if "method_seed" in own:
            own["seed"] = own.pop("method_seed")
    axes = ["seed" if axis == "method_seed" else axis for axis in axes]
    tasks = full["tasks"].split(",") if isinstance(full["tasks"], str) else list(full["tasks"])
    options = {key: full[key] for key in full if key in Options.__annotations__}
    files.check({**options, "tasks": tasks}, Options, _shown(entry))
    harness.check_limit(full.get("limit"))
    deciding = {**{key: full.get(key) for key in DECIDING_KEYS}, "tasks": tasks}
    point: Point = {
        "name": str(full.get("name") or ""),
        "method": str(model_args.get("method") or presets.of(model_args)[0].get("method", "")),
        "settings": settings,
        "axes": axes,
        "label": str(full.get("label") or "+".join(tasks)),
        "model_args": model_args,
        **deciding,
        **{key: full.get(key) for key in OTHER_KEYS},
    }
    if told := presets.of(model_args)[1]:  # by a preset, which says the rest to the model
        deciding["told"] = told
    asked = (tuple(tasks), str(full.get("include_path")))
    if asked not in of_tasks:  # read once a plan
        of_tasks[asked] = task_files.of(tasks, full.get("include_path"))
    point["hash"] = identity.digest(
        {
            "identity": identity.before_loading(model_args, str(full["model"])),
            "asked": identity.describe({key: value for key, value in deciding.items() if key != "include_path"}),
            "tasks": of_tasks[asked],
        }
    )
    return point


def _name(plan: list[Point]) -> None:
    """Names for tables: the method and its settings that differ between its points; all of them for a lone point."""
    several_models = len({_model(p) for p in plan}) > 1
    several_tasks = len({p["label"] for p in plan}) > 1
    for point in plan:
        others = [p["settings"] for p in plan if (p["model"], p["method"]) == (point["model"], point["method"])]
        differ = [k for k, v in point["settings"].items() if any(o.get(k, others) != v for o in others)]
        point["name"] = point["name"] or _spelled(point, differ or list(point["settings"]))
        extra = [_model(point)] * several_models + [point["label"]] * several_tasks
        folder = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", " ".join([point["name"], *extra]))
        point["id"] = f"{folder[:100]}-{point['hash'][:8]}"


def _spelled(point: Point, keys: list[str]) -> str:
    head = point["method"] or point["model"]
    return " ".join([head, *(f"{k}={_short(point['settings'][k])}" for k in keys)])


def _short(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return json.dumps(value, separators=(",", ":"))
    return str(value).rsplit("/", 1)[-1]  # of a path, the file


def _model(point: Point) -> str:
    return str(point["model_args"].get("pretrained", ""))


def _shown(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, default=str)[:200]


def check(plan: list[Point]) -> None:
    """Every point's settings and tasks, before anything is run.

    Raises:
        UserError: all that is wrong, each with the name of its point.
    """
    from kv_lm_eval import config

    plugin.install()

    wrong, allowed = [], harness.hf_arguments()
    for point in plan:
        if point["model"] != plugin.MODEL_NAME:
            continue
        try:
            config.parse(point["model_args"], pass_through=allowed)
            config.check_pretrained(point["model_args"].get("pretrained"))
            harness.check_device(point.get("device") or point["model_args"].get("device"))
        except UserError as error:
            wrong.append(f"{point['name']}: {error}")
    for name in sorted({task for point in plan for task in point["tasks"]} - _known_tasks(plan)):
        of_point = next(point["name"] for point in plan if name in point["tasks"])
        wrong.append(f"{of_point}: there is no task {name!r}; `kv-lm-eval ls tasks` and `lm_eval ls tasks` list them")
    if len(wrong) == 1:
        raise UserError(f"{wrong[0]}; nothing was started")
    if wrong:
        more = f"\n... and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"the plan has {len(wrong)} mistakes, nothing was started:\n" + "\n".join(wrong[:5]) + more)


def _known_tasks(plan: list[Point]) -> set[str]:
    from lm_eval.tasks import TaskManager

    known: set[str] = set()
    for folder in {point["include_path"] for point in plan}:
        names = sorted({task for point in plan if point["include_path"] == folder for task in point["tasks"]})
        ours = [name for name in names if plugin.owns_tasks([name])]
        known.update(ours)
        if rest := [name for name in names if name not in ours]:
            if folder is None and all(name.startswith(plugin.TASK_PREFIX) for name in rest):
                continue  # ours by name but unknown: no need to index lm-eval's own thousands
            manager = TaskManager(include_path=folder)
            known.update(name for name in rest if manager.match_tasks([name]))
    return known
