"""--model_args to frozen settings: aliases normalised once, types coerced, unknown keys named with their neighbours.

Everything here runs before a single weight is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from kv_lm_eval import files
from kv_lm_eval.errors import WHICH_MODEL, UserError, close_names
from kv_lm_eval.methods import base, evicted
from kv_lm_eval.methods.budget import Budget, Everything, Heads, Layers, PerHead, Ratio, RatioAbove, Slots
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.methods.evicted import Drop, Evicted
from kv_lm_eval.methods.schedule import Schedule
from kv_lm_eval.methods.storage import Storage

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
VALUE_ALIASES: dict[tuple[str, str], Any] = {
    ("pooling", "maxpool"): "max",
    ("pooling", "avgpool"): "avg",
    ("block_size", "fullc"): "full",
}
VALUE_ALIASES |= {("nbits", "None"): 0, ("nbits", "none"): 0}
BUDGET_KEYS = ("max_capacity_prompt", "keep_ratio", "compression_ratio")
LARGEST = 2**31 - 1  # positions are 32-bit numbers


def _names(*parts: Any) -> set[str]:
    return {field.name for part in parts for field in dataclasses.fields(part)}


TREATMENTS = {name: _names(evicted.load(name)) for name in evicted.available()}
STORAGE_KEYS = _names(Storage)
PARTS = (Slots, Ratio, RatioAbove, Layers, Heads, Schedule, Storage)
COMMON_KEYS = _names(*PARTS).union(*TREATMENTS.values()) | {*BUDGET_KEYS, "evicted"}

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
            "help": "loglikelihood: context tokens fed after the compression, before the continuation; with 0 the "
            "first continuation token would be scored from the uncompressed prompt"
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
    question_in_prompt: bool = dataclasses.field(
        default=True,
        metadata={
            "help": "True: the whole prompt is compressed, its question included; False: what stands before the "
            "question is compressed first, and the question is fed over the compressed cache"
        },
    )
    question_field: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "question_in_prompt=False: the document's field with the question; None: the first of question, "
            "input, query, problem, goal that is found in the prompt"
        },
    )

    prefill_chunk: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "feed a prompt in chunks of this many tokens and cut after the last one: the same answers in less "
            "memory; None: in one forward"
        },
    )
    prefill_evict: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "the same with a cut after every chunk, so that the memory does not grow with the prompt: OTHER "
            "answers, since later chunks do not see what was evicted; for methods that work online (not for documents, "
            "which are streamed anyway)"
        },
    )

    compile: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "generate_until: decode by one compiled graph (a CUDA graph on CUDA), for method=streaming_ring "
            "and for compress_every=0; compiling takes a minute for each batch size and number of slots"
        },
    )

    def __post_init__(self) -> None:
        for name in ("prefill_chunk", "prefill_evict"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"{name}={size} must be at least 1 token; None feeds a prompt in one forward")
        if self.prefill_chunk is not None and self.prefill_evict is not None:
            raise UserError(
                f"prefill_chunk={self.prefill_chunk} and prefill_evict={self.prefill_evict} both cut the prompt up; "
                "give the first for the answers of one forward, the second for memory that does not grow"
            )
        if self.question_field is not None and self.question_in_prompt:
            raise UserError(
                f"question_field={self.question_field} has no effect with question_in_prompt=True, under which the "
                "whole prompt is compressed; add question_in_prompt=False"
            )
        if self.tail_tokens < 0:
            raise UserError(f"tail_tokens={self.tail_tokens} is negative; it counts context tokens, 0 or more")
        if self.rolling_compress_every < 1:
            raise UserError(f"rolling_compress_every={self.rolling_compress_every} must be at least 1 token")

    def warnings(self, compression: Compression) -> list[str]:
        """Settings that do nothing with this compression; they are no mistake where runs of a sweep share them."""
        out, name, every = [], compression.method.name, compression.schedule.compress_every
        if self.rolling_compress_every != EngineSettings.rolling_compress_every:
            if every:
                out.append(
                    f"rolling_compress_every has no effect beside compress_every={every}, which cuts documents too"
                )
            elif not compression.method.compresses:
                out.append(f"rolling_compress_every has no effect: method={name} evicts nothing")
        if not compression.lossy:
            if self.tail_tokens != EngineSettings.tail_tokens:
                out.append(
                    f"tail_tokens={self.tail_tokens} has no effect: method={name} compresses nothing before them"
                )
            if not self.question_in_prompt:
                out.append(
                    f"question_in_prompt=False has no effect: method={name} compresses nothing before the question"
                )
        return out

    def check(self, method: base.Method) -> None:
        """Raises UserError for settings that do nothing, or nothing sensible, with this method."""
        for name in ("prefill_chunk", "prefill_evict"):
            if getattr(self, name) is not None and not method.uses_cache:
                raise UserError(f"{name}={getattr(self, name)} has no effect: method={method.name} has no cache")
        if self.prefill_evict is None or method.evicts_in_prefill:
            return
        if not method.compresses:
            raise UserError(
                f"prefill_evict={self.prefill_evict} has no effect: method={method.name} evicts nothing; "
                f"prefill_chunk={self.prefill_evict} feeds the prompt in chunks"
            )
        online = ", ".join(name for name in base.available() if base.load(name).evicts_in_prefill)
        raise UserError(
            f"prefill_evict={self.prefill_evict} would cut in the middle of the prompt, where method={method.name} is "
            "defined by its end: each chunk's own last tokens would vote, which is another method. Use "
            f"prefill_chunk={self.prefill_evict} for the same answers in less memory, or one of: {online}"
        )


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
    rest: Any = args.pop("model_kwargs", None) or {}
    rest = _json_object("model_kwargs", rest) if isinstance(rest, str) else rest
    if not isinstance(rest, dict):
        raise UserError(f"model_kwargs={rest!r} must be a mapping of arguments of from_pretrained")
    rest = dict(rest)

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
    if rest.get("max_length") is not None:
        rest["max_length"] = _tokens("max_length", rest["max_length"])
    compression, engine = _build(cls, ours), _dataclass(EngineSettings, ours)
    engine.check(compression.method)
    return compression, engine, rest


def _tokens(name: str, value: Any) -> int:
    """A number of tokens, written as 8192 or as 8e3."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value < 2**31 or value != int(value):
        raise UserError(
            f"{name}={value!r} is no number of tokens: give a whole one from 1 to {2**31 - 1:,}, or leave it out"
        )
    return int(value)


def _put(ours: dict[str, Any], key: str, value: Any) -> None:
    """Adds a setting under our name for it; the same one twice with different values is a contradiction."""
    name = ALIASES.get(key, key)
    if name in ours and ours[name] != value:
        raise UserError(f"{name} is given twice: {ours[name]!r} and {value!r} (as {key})")
    ours[name] = value


def _known_keys(cls: type[base.Method]) -> set[str]:
    common = COMMON_KEYS if cls.compresses else STORAGE_KEYS if STORAGE_KEYS & set(cls.presets) else set()
    return _names(cls, EngineSettings) | common


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
        return _json_object("compression", text)
    path = Path(text).expanduser()
    if not path.is_file():
        raise UserError(f"compression={text} is neither a JSON object nor an existing YAML file")
    loaded = files.read_yaml(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold one mapping of settings, it holds {type(loaded).__name__}")
    return dict(files.check(loaded, dict[str, Any], str(path)))


def _json_object(name: str, text: str) -> dict[str, Any]:
    place = f"{name}={text if len(text) < 80 else text[:77] + '...'}"
    return dict(files.check(files.parse_json(text, place), dict[str, Any], place))


def _build(cls: type[base.Method], ours: dict[str, Any]) -> Compression:
    method = _dataclass(cls, ours)
    method.validate()
    values = {**cls.presets, **ours}
    storage = _storage(cls, values, ours)
    if not cls.compresses:
        return Compression(method, Everything(), Schedule(), Drop(), storage=storage)
    for key, why in method.without_effect.items():
        if key in ours:
            raise UserError(f"{key}={ours[key]} has no effect: {why}")
    schedule, layers, heads = (_dataclass(part, values) for part in (Schedule, Layers, Heads))
    budget = _budget(method, values)
    _check_shares(method, budget, layers, heads, ours)
    compression = Compression(method, budget, schedule, _evicted(method, values), heads, storage, layers)
    budget.check(method.protected, method.name)
    if cls.ring and storage.quantises:
        raise UserError(
            f"nbits={storage.nbits}: method={cls.name} overwrites single pairs in place, which groups of coded ones do "
            "not allow; method=streaming_llm keeps the same pairs and takes nbits"
        )
    if cls.ring and not (compression.banded and isinstance(compression.budget, Slots) and schedule.compress_every == 1):
        raise UserError(
            f"method={cls.name} overwrites one pair a token in a ring of fixed size: it takes a number of slots and "
            "compress_every=1, the same for all layers and heads, and drops what it evicts. method=streaming_llm takes "
            "everything else"
        )
    for name in _names(cls) & _names(Schedule):  # a method that computes with the schedule has its settings too
        assert getattr(method, name) == getattr(schedule, name), f"{cls.name}: {name} has two defaults"
    return compression


def _budget(method: base.Method, values: dict[str, Any]) -> Budget:
    """The budget that the given settings name; exactly one total must be among them."""
    if method.head_slots is not None:
        return PerHead(method.head_slots)
    given = [k for k in BUDGET_KEYS if values.get(k) is not None]
    own = method.own_capacity
    if given and all(values.get(k) is None for k in method.capacity_settings):
        own = None  # a size of its own is only what it has where none is given
    if own is not None:
        if given:
            also = next((k for k in method.capacity_settings if values.get(k) is not None), method.capacity_settings[0])
            raise UserError(
                f"{given[0]}={values[given[0]]} and {also}={getattr(method, also)} both fix the budget of "
                f"{method.name} (the second makes it {own} slots); give one of them"
            )
        given, values = ["max_capacity_prompt"], {**values, "max_capacity_prompt": own}
    if len(given) != 1:
        got = "none" if not given else " and ".join(f"{k}={values[k]}" for k in given)
        extra = f" (or {' or '.join(method.capacity_settings)})" if method.capacity_settings else ""
        raise UserError(
            f"{method.name} needs one budget, got {got}: max_capacity_prompt=SLOTS{extra}, keep_ratio=SHARE kept, or "
            "compression_ratio=SHARE removed"
        )
    if given[0] == "max_capacity_prompt":
        if values.get("prune_after") is not None:
            raise UserError(
                f"prune_after={values['prune_after']} has no effect without keep_ratio or compression_ratio: a fixed "
                "number of slots is kept whatever is held"
            )
        return _dataclass(Slots, values)
    share = _coerce(values[given[0]], float, given[0])
    if given[0] == "compression_ratio":
        if not 0 <= share < 1:
            raise UserError(f"compression_ratio={share:g} is outside [0, 1): it is the share of pairs that is removed")
        share = float(round(1 - share, 12))
    return _dataclass(RatioAbove if values.get("prune_after") is not None else Ratio, {**values, "keep_ratio": share})


def _check_shares(method: base.Method, budget: Budget, layers: Layers, heads: Heads, ours: dict[str, Any]) -> None:
    """Raises UserError for settings that share out a budget and do nothing, or nothing sensible."""
    for key, part, without in (
        ("beta", "layer_budget=pyramid", not layers.differ),
        ("alpha", "head_budget=ada", not heads.differ),
    ):
        if key in ours and without:
            raise UserError(f"{key}={ours[key]} has no effect without {part}")
    if layers.rounding != "exact" and not (layers.differ or heads.differ or isinstance(budget, Ratio)):
        raise UserError(
            "rounding=reference has no effect on a fixed number of slots for every layer and head, which nothing rounds"
        )
    if layers.differ and isinstance(budget, RatioAbove):
        raise UserError(
            f"prune_after={budget.prune_after} with layer_budget=pyramid: it asks what a layer holds, which then "
            "differs between layers, so that each would be cut at other times and by other shares; leave one out"
        )
    if heads.differ and method.heads_alike:
        raise UserError(
            f"head_budget=ada has no effect: method={method.name}{' as it is set' if method.capacity_settings else ''} "
            "gives all heads of a layer the same scores; it is for methods whose heads choose for themselves"
        )


def _storage(cls: type[base.Method], values: dict[str, Any], ours: dict[str, Any]) -> Storage:
    storage = _dataclass(Storage, values)
    if not storage.quantises:
        if given := sorted(STORAGE_KEYS & set(ours) - {"nbits"}):
            raise UserError(f"{given[0]}={ours[given[0]]} has no effect without nbits=2, 4 or 8")
        if cls.presets.get("nbits"):
            raise UserError(f"nbits={storage.nbits} leaves method={cls.name} nothing to do: that is method=full")
    return storage


def _evicted(method: base.Method, values: dict[str, Any]) -> Evicted:
    name = str(values.get("evicted", "drop"))
    treatment = _dataclass(evicted.load(name), values)
    for key in sorted(set(values) - TREATMENTS[name] - _names(method)):
        if others := [other for other, keys in TREATMENTS.items() if key in keys]:
            raise UserError(
                f"{key}={values[key]} has no effect with evicted={name}: it is a setting of evicted={others[0]}"
            )
    treatment.check(method)
    return treatment


def _dataclass(cls: Any, values: dict[str, Any]) -> Any:
    """Builds a settings dataclass from the keys that it has, with types coerced and choices checked."""
    hints = typing.get_type_hints(cls)
    taken = {}
    for field in dataclasses.fields(cls):
        if field.name in values:
            value = VALUE_ALIASES.get((field.name, str(values[field.name])), values[field.name])
            choices = field.metadata.get("choices", ())
            if "none" in choices and str(value).lower() == "none":  # a choice by that name, not a missing value
                value = "none"
            else:
                value = _coerce(value, hints[field.name], field.name)
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
            return _whole_numbers(value, name)
        if target is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if target is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            if abs(float(value)) > LARGEST:
                raise UserError(f"{name}={value} is beyond the numbers that tokens are counted in, at most {LARGEST}")
            return int(float(value))
        if target is float:
            if isinstance(value, bool) or not isfinite(float(value)):
                raise ValueError
            return float(value)
        if target is str and isinstance(value, float) and value.is_integer():
            return str(int(value))
        return target(value) if target is str else value
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError):
        names = {
            "int": "a whole number",
            "float": "a finite number",
            "bool": "True or False",
        }
        wanted = names.get(target.__name__, target.__name__)
        raise UserError(f"{name}={value!r} must be {wanted}") from None


def _whole_numbers(value: Any, name: str) -> tuple[int, ...]:
    """0, [0, 1], "[0,1]" or "0;1" as a tuple."""
    if isinstance(value, str):
        value = [v for v in value.strip("[]() ").replace(";", ",").split(",") if v.strip()]
    values = value if isinstance(value, (list, tuple)) else [value]
    try:
        return tuple(_coerce(v, int, name) for v in values)
    except UserError as error:
        raise UserError(f"{name}={value!r} must be whole numbers, as [0,1]: {error}") from None


def check_pretrained(pretrained: Any) -> None:
    """Raises UserError where `pretrained` is missing, or plainly a path and nothing is there."""
    if pretrained is None:
        raise UserError(WHICH_MODEL)
    if isinstance(pretrained, str):
        path = Path(pretrained).expanduser()
        looks_local = pretrained.startswith((".", "/", "~", os.sep)) or pretrained.count("/") > 1
        if looks_local and not path.exists():
            raise UserError(
                f"pretrained={pretrained}: there is no such folder ({path.resolve()}). Give a folder with config.json "
                "and weights, a hub name such as owner/model, or kv-tiny for the embedded model."
            )
