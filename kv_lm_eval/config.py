"""--model_args to frozen settings: aliases normalised once, types coerced, unknown keys named with their neighbours.

Everything here runs before a single weight is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.methods import base
from kv_lm_eval.methods.budget import Budget, Everything, Heads, Pyramid, Ratio, RatioAbove, Slots
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.methods.evicted import Compensate, Drop, Evicted
from kv_lm_eval.methods.schedule import Schedule

ALIASES = {  # names used by the papers and their repositories -> ours
    "start_size": "n_sink",
    "sink_size": "n_sink",
    "num_sinks": "n_sink",
    "recent_size": "window_size",
    "budget": "max_capacity_prompt",
    "capacity": "max_capacity_prompt",
    "max_capacity_prompts": "max_capacity_prompt",
    "window_sizes": "window_size",
    "kernel_sizes": "kernel_size",
}
VALUE_ALIASES = {("pooling", "maxpool"): "max", ("pooling", "avgpool"): "avg", ("block_size", "fullc"): "full"}
BUDGET_KEYS = ("max_capacity_prompt", "keep_ratio", "compression_ratio")
LAYER_BUDGETS = ("uniform", "pyramid")


def _names(*parts: Any) -> set[str]:
    return {field.name for part in parts for field in dataclasses.fields(part)}


COMPENSATION_KEYS = _names(Compensate) - _names(Drop)
PARTS = (Slots, Ratio, RatioAbove, Pyramid, Heads, Schedule, Compensate)
COMMON_KEYS = _names(*PARTS) | {*BUDGET_KEYS, "layer_budget"}

# from_pretrained arguments that lm-eval users pass through --model_args beyond HFLM's own
FROM_PRETRAINED_KEYS = frozenset(
    """attn_implementation cache_dir code_revision device_map force_download local_files_only low_cpu_mem_usage
    max_memory offload_buffers offload_state_dict state_dict token torch_dtype use_safetensors variant
    bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant load_in_4bit load_in_8bit quantization_config
    """.split()
)


@dataclass(frozen=True)
class EngineSettings:
    """How requests are run, whatever the method."""

    tail_tokens: int = dataclasses.field(
        default=1,
        metadata={
            "help": "loglikelihood: context tokens fed after the compression, before the "
            "continuation; with 0 the first "
            "continuation token would be scored from the uncompressed prompt"
        },
    )
    rolling_compress_every: int = dataclasses.field(
        default=64,
        metadata={"help": "loglikelihood_rolling: cut the cache every this many tokens, where compress_every is 0"},
    )
    overlong: str = dataclasses.field(
        default="error",
        metadata={
            "help": "a prompt longer than the model's maximum: stop with an error before any work, or cut it from the "
            "left as lm-eval does",
            "choices": ("error", "truncate_left"),
        },
    )

    def __post_init__(self) -> None:
        if self.tail_tokens < 0:
            raise UserError(f"tail_tokens={self.tail_tokens} is negative; it counts context tokens, 0 or more")
        if self.rolling_compress_every < 1:
            raise UserError(f"rolling_compress_every={self.rolling_compress_every} must be at least 1 token")


def parse(
    args: dict[str, Any], pass_through: set[str] | None = None
) -> tuple[Compression, EngineSettings, dict[str, Any]]:
    """Splits --model_args into ours and those of lm-eval's HF model.

    Args:
        args: as lm-eval hands them over; may hold `compression` (a dict, a JSON string or the path of a YAML file)
            and `model_kwargs` (a dict handed to from_pretrained unread).
        pass_through: names that lm-eval's HF model class takes.

    Returns:
        the method, the engine's settings, and what is left for the HF model.

    Raises:
        UserError: unknown method or setting, a value of the wrong type or outside its range.
    """
    args = dict(args)
    ours: dict[str, Any] = {}
    for key, value in _nested(args.pop("compression", None)).items():
        _put(ours, key, value)
    if args.get("method") is not None:
        _put(ours, "method", args["method"])
    args.pop("method", None)
    if ours.get("method") is None:
        raise UserError(f"which method? Add method=NAME to --model_args, one of: {', '.join(base.available())}.")
    cls = base.load(str(ours.pop("method")))
    rest: dict[str, Any] = dict(args.pop("model_kwargs", None) or {})

    known = _known_keys(cls)
    for key in list(args):
        if ALIASES.get(key, key) in known:
            _put(ours, key, args.pop(key))
    if unknown := [k for k in ours if k not in known]:
        raise UserError(_unknown(unknown[0], cls, known, known))
    allowed = (pass_through or set()) | FROM_PRETRAINED_KEYS
    for key in args:
        if pass_through is not None and key not in allowed:
            raise UserError(_unknown(key, cls, known, known | allowed))
    rest.update(args)
    return _build(cls, ours), _dataclass(EngineSettings, ours), rest


def _put(ours: dict[str, Any], key: str, value: Any) -> None:
    """Adds a setting under our name for it; the same one twice with different values is a contradiction."""
    name = ALIASES.get(key, key)
    if name in ours and ours[name] != value:
        raise UserError(f"{name} is given twice: {ours[name]!r} and {value!r} (as {key})")
    ours[name] = value


def _known_keys(cls: type[base.Method]) -> set[str]:
    return _names(cls, EngineSettings) | (COMMON_KEYS if cls.compresses else set())


def _unknown(key: str, cls: type[base.Method], known: set[str], resembling: set[str]) -> str:
    own, engine = sorted(known - _names(EngineSettings)), sorted(_names(EngineSettings))
    takes = ", ".join(own) if own else "no settings"
    return (
        f"unknown setting {key!r}{close_names(key, resembling | set(ALIASES))}. method={cls.name} takes {takes}; every "
        f"method takes {', '.join(engine)}. What from_pretrained shall get unread goes into model_kwargs={{...}}. "
        f"See `kv-lm-eval methods {cls.name}`."
    )


def _nested(value: Any) -> dict[str, Any]:
    """`compression=`: a dict, a JSON string, or the path of a YAML file."""
    if value is None:
        return {}
    if isinstance(value, dict):
        return dict(value)
    text = str(value).strip()
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"compression={text} is not valid JSON: {error}") from error
    path = Path(text).expanduser()
    if not path.is_file():
        raise UserError(f"compression={text} is neither a JSON object nor an existing YAML file")
    import yaml

    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold one mapping of settings, it holds {type(loaded).__name__}")
    return loaded


def _build(cls: type[base.Method], ours: dict[str, Any]) -> Compression:
    method = _dataclass(cls, ours)
    method.validate()
    if not cls.compresses:
        return Compression(method, Everything(), Schedule(), Drop())
    values = {**cls.presets, **ours}
    schedule, heads = _dataclass(Schedule, values), _dataclass(Heads, values)
    if "alpha" in ours and heads.head_budget != "ada":
        raise UserError(f"alpha={ours['alpha']} has no effect: it is a setting of head_budget=ada")
    compression = Compression(method, _budget(method, values), schedule, _evicted(method, values), heads)
    compression.budget.check(method.protected, method.name)
    return compression


def _budget(method: base.Method, values: dict[str, Any]) -> Budget:
    """The budget that the given settings name; exactly one total must be among them."""
    given = [k for k in BUDGET_KEYS if values.get(k) is not None]
    own = method.own_capacity
    if own is not None:
        if given:
            raise UserError(
                f"{given[0]}={values[given[0]]} and "
                f"{method.capacity_setting}={values.get(method.capacity_setting)} both fix "
                f"the budget of {method.name} (the second makes it {own} slots); give one of them"
            )
        given, values = ["max_capacity_prompt"], {**values, "max_capacity_prompt": own}
    if len(given) != 1:
        got = "none" if not given else " and ".join(f"{k}={values[k]}" for k in given)
        extra = f" (or {method.capacity_setting})" if method.capacity_setting else ""
        raise UserError(
            f"{method.name} needs one budget, got {got}: max_capacity_prompt=SLOTS{extra}, keep_ratio=SHARE kept, or "
            "compression_ratio=SHARE removed"
        )
    pyramid = values.get("layer_budget", "uniform")
    if pyramid not in LAYER_BUDGETS:
        raise UserError(f"layer_budget={pyramid} is not one of: {', '.join(LAYER_BUDGETS)}")
    for key, needs in (("beta", pyramid == "pyramid"), ("prune_after", given[0] != "max_capacity_prompt")):
        if values.get(key) is not None and not needs:
            wanted = "layer_budget=pyramid" if key == "beta" else "keep_ratio or compression_ratio"
            raise UserError(f"{key}={values[key]} has no effect without {wanted}")
    if given[0] == "max_capacity_prompt":
        return _dataclass(Pyramid if pyramid == "pyramid" else Slots, values)
    if pyramid == "pyramid":
        raise UserError(f"layer_budget=pyramid shares out slots: give max_capacity_prompt instead of {given[0]}")
    share = _coerce(values[given[0]], float, given[0])
    if given[0] == "compression_ratio":
        if not 0 <= share < 1:
            raise UserError(f"compression_ratio={share:g} is outside [0, 1): it is the share of pairs that is removed")
        share = float(round(1 - share, 12))
    return _dataclass(RatioAbove if values.get("prune_after") is not None else Ratio, {**values, "keep_ratio": share})


def _evicted(method: base.Method, values: dict[str, Any]) -> Evicted:
    kind = _dataclass(Drop, values).evicted  # coerced, and one of its choices
    if kind == "drop":
        if given := sorted(COMPENSATION_KEYS & set(values)):
            raise UserError(f"{given[0]}={values[given[0]]} has no effect: it is a setting of evicted=compensate")
        return Drop()
    evicted = _dataclass(Compensate, values)
    evicted.check(method)
    return evicted


def _dataclass(cls: Any, values: dict[str, Any]) -> Any:
    """Builds a settings dataclass from the keys that it has, with types coerced and choices checked."""
    hints = typing.get_type_hints(cls)
    taken = {}
    for field in dataclasses.fields(cls):
        if field.name in values:
            value = VALUE_ALIASES.get((field.name, str(values[field.name])), values[field.name])
            value = _coerce(value, hints[field.name], field.name)
            choices = field.metadata.get("choices", ())
            if choices and value not in choices:
                allowed = ", ".join(map(str, choices))
                raise UserError(
                    f"{field.name}={value} is not one of: {allowed}{close_names(str(value), map(str, choices))}"
                )
            taken[field.name] = value
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{cls.name or cls.__name__} needs {field.name}: {field.metadata.get('help', '')}")
    return cls(**taken)


def _coerce(value: Any, kind: Any, name: str) -> Any:
    """The CLI turns -1 into -1.0 and 1e3 into 1000.0: integers come back as integers, fractions as errors."""
    options = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in options:
            return None
        raise UserError(f"{name}=None: a value is needed")
    target = next(o for o in options if o is not type(None))
    try:
        if typing.get_origin(target) is tuple:
            return _whole_numbers(value)
        if target is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if target is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if target is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        if target is str and isinstance(value, float) and value.is_integer():
            return str(int(value))
        return target(value) if target is str else value
    except (ValueError, KeyError, TypeError, OverflowError):
        names = {
            "int": "a whole number",
            "float": "a number",
            "bool": "True or False",
            "tuple": "whole numbers, as [0,1]",
        }
        wanted = names.get(target.__name__, target.__name__)
        raise UserError(f"{name}={value!r} must be {wanted}") from None


def _whole_numbers(value: Any) -> tuple[int, ...]:
    """0, [0, 1], "[0,1]" or "0;1" as a tuple."""
    if isinstance(value, str):
        value = [v for v in value.strip("[]() ").replace(";", ",").split(",") if v.strip()]
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_coerce(v, int, "one of them") for v in values)


def check_pretrained(pretrained: Any) -> None:
    """Raises UserError where `pretrained` is plainly a path and nothing is there."""
    if isinstance(pretrained, str):
        path = Path(pretrained).expanduser()
        looks_local = pretrained.startswith((".", "/", "~", os.sep)) or pretrained.count("/") > 1
        if looks_local and not path.exists():
            raise UserError(
                f"pretrained={pretrained}: there is no such folder ({path.resolve()}). Give a folder "
                "with config.json and "
                "weights, a hub name such as owner/model, or kv-tiny for the embedded model."
            )
