"""--model_args to frozen settings: aliases normalised once, types coerced, unknown keys named with their neighbours.

Everything here runs before a single weight is loaded.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from kv_lm_eval import files, presets
from kv_lm_eval.coerce import coerce, dataclass_of
from kv_lm_eval.errors import WHICH_MODEL, UserError, close_names
from kv_lm_eval.methods import base, evicted, storage
from kv_lm_eval.methods.budget import Budget, Everything, Heads, Layers, PerHead, Ratio, RatioAbove, Slots, Threshold
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.methods.evicted import Drop, Evicted
from kv_lm_eval.methods.schedule import Schedule
from kv_lm_eval.methods.unit import Unit
from kv_lm_eval.settings import EngineSettings

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
BUDGET_KEYS = ("max_capacity_prompt", "keep_ratio", "compression_ratio", "threshold")


def _names(*parts: Any) -> set[str]:
    return {field.name for part in parts for field in dataclasses.fields(part)}


TREATMENTS = {name: _names(evicted.load(name)) for name in evicted.available()}
STORAGES = {name: _names(storage.load(name)) for name in storage.available()}
STORAGE_KEYS = {storage.KEY}.union(*STORAGES.values())
PARTS = (Slots, Ratio, RatioAbove, Threshold, Layers, Heads, Unit, Schedule)
COMMON_KEYS = _names(*PARTS).union(*TREATMENTS.values()) | {*BUDGET_KEYS, "evicted"} | STORAGE_KEYS

# from_pretrained arguments that lm-eval users pass through --model_args beyond HFLM's own
FROM_PRETRAINED_KEYS = frozenset(
    """attn_implementation cache_dir code_revision device_map force_download local_files_only low_cpu_mem_usage
    max_memory offload_buffers offload_state_dict state_dict token torch_dtype use_safetensors variant
    bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant load_in_4bit load_in_8bit quantization_config
    """.split()
)


def parse(
    args: dict[str, Any], pass_through: set[str] | None = None
) -> tuple[Compression, EngineSettings, dict[str, Any]]:
    """Splits --model_args into ours and those of lm-eval's HF model.

    Args:
        args: as lm-eval hands them over; may hold `compression` (a dict, a JSON string or the path of a YAML file),
            `preset` (a name; what else is given wins) and `model_kwargs` (a dict handed to from_pretrained unread).
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
    preset = _preset(args, ours)
    ours.setdefault("method", preset.pop("method", None))
    if ours.get("method") is None:
        raise UserError(f"which method? Add method=NAME to --model_args, one of: {', '.join(base.available())}.")
    cls = base.load(str(ours.pop("method")), {**args, **ours})
    rest: Any = args.pop("model_kwargs", None) or {}
    rest = _json_object("model_kwargs", rest) if isinstance(rest, str) else rest
    if not isinstance(rest, dict):
        raise UserError(f"model_kwargs={rest!r} must be a mapping of arguments of from_pretrained")
    rest = dict(rest)

    known = _known_keys(cls)
    for key in list(args):
        if ALIASES.get(key, key) in known:
            _put(ours, key, args.pop(key))
    ours = {**preset, **ours}
    if unknown := [k for k in ours if k not in known]:
        raise UserError(_unknown(unknown[0], cls, known, known))
    allowed = (pass_through or set()) | FROM_PRETRAINED_KEYS
    for key in args:
        if pass_through is not None and key not in allowed:
            raise UserError(_unknown(key, cls, known, known | allowed))
    rest.update(args)
    if rest.get("max_length") is not None:
        rest["max_length"] = _tokens("max_length", rest["max_length"])
    compression, engine = _build(cls, ours), dataclass_of(EngineSettings, ours)
    engine.check(compression.method)
    return compression, engine, rest


def _tokens(name: str, value: Any) -> int:
    """A number of tokens, written as 8192 or as 8e3."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value < 2**31 or value != int(value):
        raise UserError(
            f"{name}={value!r} is no number of tokens: give a whole one from 1 to {2**31 - 1:,}, or leave it out"
        )
    return int(value)


def _preset(args: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Takes `preset` out of the arguments; its settings under our names, none where none is named.

    Raises:
        UserError: there is none of that name, or another method than its own is asked for.
    """
    found: dict[str, Any] = {}
    name = presets.named({**ours, **args})
    if name is None:
        return found
    for key, value in presets.load(name)["model"].items():
        _put(found, key, value)
    asked = ours.get("method", found.get("method"))
    args.pop(presets.KEY)
    if str(asked) != str(found.get("method")):
        raise UserError(f"method={asked} and preset={name}, which is method={found.get('method')}; give one of them")
    return found


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
    method = dataclass_of(cls, ours)
    method.validate()
    values = {**cls.presets, **ours}
    held_as = _storage(cls, values, ours)
    if not cls.compresses:
        return Compression(method, Everything(), Schedule(), Drop(), storage=held_as)
    for key, why in method.without_effect.items():
        if key in ours:
            raise UserError(f"{key}={ours[key]} has no effect: {why}")
    schedule, layers, heads, unit = (dataclass_of(part, values) for part in (Schedule, Layers, Heads, Unit))
    budget = _budget(method, values)
    _check_shares(method, budget, layers, heads, unit, ours)
    _check_unit(method, budget, layers, heads, unit, ours)
    if budget.open or layers.together:
        _check_open(method, budget, layers, heads, schedule)
    compression = Compression(method, budget, schedule, _evicted(method, values), heads, held_as, layers, unit)
    budget.check(method.protected, method.name)
    if cls.ring and held_as.quantises:
        raise UserError(
            f"{held_as.words}: method={cls.name} overwrites single pairs in place, which coded ones do not allow; "
            f"method=streaming_llm keeps the same pairs and takes {held_as.words}"
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
            f"{method.name} needs one budget, got {got}: max_capacity_prompt=SLOTS{extra}, keep_ratio=SHARE kept, "
            "compression_ratio=SHARE removed, or threshold=SCORE below which pairs go"
        )
    if given[0] != "threshold" and values.get("threshold_recent") is not None:
        raise UserError(
            f"threshold_recent={values['threshold_recent']} has no effect with {given[0]}: it goes with threshold"
        )
    if given[0] in ("max_capacity_prompt", "threshold"):
        if values.get("prune_after") is not None:
            raise UserError(
                f"prune_after={values['prune_after']} has no effect without keep_ratio or compression_ratio: it is for "
                f"shares of what is held, not for {given[0]}"
            )
        return dataclass_of(Slots if given[0] == "max_capacity_prompt" else Threshold, values)
    share = coerce(values[given[0]], float, given[0])
    if given[0] == "compression_ratio":
        if not 0 <= share < 1:
            raise UserError(f"compression_ratio={share:g} is outside [0, 1): it is the share of pairs that is removed")
        share = float(round(1 - share, 12))
    return dataclass_of(RatioAbove if values.get("prune_after") is not None else Ratio, {**values, "keep_ratio": share})


def _check_shares(
    method: base.Method, budget: Budget, layers: Layers, heads: Heads, unit: Unit, ours: dict[str, Any]
) -> None:
    """Raises UserError for settings that share out a budget and do nothing, or nothing sensible."""
    for key, part, without in (
        ("beta", "layer_budget=pyramid", layers.layer_budget != "pyramid"),
        ("alpha", "head_budget=ada", not heads.differ),
    ):
        if key in ours and without:
            raise UserError(f"{key}={ours[key]} has no effect without {part}")
    if layers.rounding != "exact" and not (layers.differ or heads.differ or unit.whole or isinstance(budget, Ratio)):
        raise UserError(
            "rounding=reference has no effect on a fixed number of slots for every layer and head, which nothing rounds"
        )
    if layers.differ and isinstance(budget, RatioAbove):
        raise UserError(
            f"prune_after={budget.prune_after} with layer_budget={layers.layer_budget}: it asks what a layer holds, "
            "which then differs between layers, so that each is cut at other times and by other shares; leave one out"
        )
    if heads.differ and method.heads_alike:
        raise UserError(
            f"head_budget={heads.head_budget} has no effect: method={method.name}"
            f"{' as it is set' if method.capacity_settings else ''} gives all heads of a layer the same scores; it is "
            "for methods whose heads choose for themselves"
        )


def _check_unit(
    method: base.Method, budget: Budget, layers: Layers, heads: Heads, unit: Unit, ours: dict[str, Any]
) -> None:
    """Raises UserError for chunks of slots that do nothing, or nothing sensible."""
    if not unit.whole:
        if "unit_size" in ours:
            raise UserError(f"unit_size={unit.unit_size} has no effect without unit=chunk")
        return
    if method.sinks_and_recent is not None or method.head_slots is not None or method.ring or method.hides:
        raise UserError(
            f"unit=chunk has no effect: method={method.name} keeps tokens by their place, neighbours with each other; "
            "it is for methods that score tokens"
        )
    if budget.open or layers.together:
        raise UserError(
            f"{'layer_budget=global' if layers.together else 'threshold'} with unit=chunk: the one goes by the score "
            "of each slot in each head, the other by a chunk's in all heads; leave one of them out"
        )
    if heads.differ:
        raise UserError(
            "head_budget=ada with unit=chunk: a chunk's score is summed over the heads, all of which keep the same "
            "chunks, so that none could keep more than another; leave one of them out"
        )
    if isinstance(budget, Slots) and budget.max_capacity_prompt < unit.unit_size:
        raise UserError(
            f"unit_size={unit.unit_size} is more than max_capacity_prompt={budget.max_capacity_prompt}, so that no "
            "whole chunk would ever fit; take smaller chunks or a larger budget"
        )


def _check_open(method: base.Method, budget: Budget, layers: Layers, heads: Heads, schedule: Schedule) -> None:
    """Raises UserError for settings that cannot go with scores that decide how many pairs of a layer or head stay."""
    setting = f"threshold={budget.threshold:g}" if isinstance(budget, Threshold) else "layer_budget=global"
    if budget.open and (layers.differ or heads.differ):
        other = f"layer_budget={layers.layer_budget}" if layers.differ else "head_budget=ada"
        raise UserError(f"{other} shares out a number of slots, and {setting} names none; give one of them")
    if heads.differ:
        raise UserError(
            f"{setting} ranks the slots of all layers and heads together, and head_budget={heads.head_budget} shares "
            "out what each layer has: add head_budget=uniform, or leave layer_budget out"
        )
    if method.sinks_and_recent is not None or method.reinserted:
        raise UserError(
            f"{setting} has no effect: method={method.name} goes by positions, by which all layers and heads are "
            "alike; it is for methods that look at keys, values or attention"
        )
    if budget.open and method.reads_budget:
        raise UserError(
            f"method={method.name} as it is set protects a share of its budget, and {setting} names no number of slots"
        )
    if schedule.online and schedule.trigger == "excess":
        raise UserError(
            f"trigger=excess counts the slots of a layer over its own budget, which {setting} does not have; take "
            "trigger=clock"
        )


def _storage(cls: type[base.Method], values: dict[str, Any], ours: dict[str, Any]) -> storage.Storage:
    """The form in which pairs are held."""
    kind, values = storage.chosen(values)
    held_as = dataclass_of(kind, values)
    given = [key for key in ours if key in STORAGE_KEYS - {storage.KEY}]
    if not held_as.quantises:
        bits = next((key for key in kind.asked_by if key in values), None)
        said = f"{bits}={values[bits]}" if bits else f"{storage.KEY}={kind.name}"
        if kind.name == str(values.get(storage.KEY)).lower() != storage.Storage.name:
            raise UserError(f"{said} says in how many bits nothing is held: add {kind.asked_by[0]}=4")
        if others := sorted(set(given) - {"nbits"}):
            raise UserError(f"{others[0]}={ours[others[0]]} has no effect without nbits=2, 3, 4 or 8, or {storage.KEY}")
        if STORAGE_KEYS & set(cls.presets):
            raise UserError(f"{said} leaves method={cls.name} nothing to do: that is method=full")
    for key in given:
        if held_as.quantises and key not in STORAGES[kind.name]:
            of = " or ".join(name for name, keys in STORAGES.items() if key in keys)
            raise UserError(
                f"{key}={ours[key]} has no effect with {held_as.words}: it is a setting of {storage.KEY}={of}"
            )
    return held_as


def _evicted(method: base.Method, values: dict[str, Any]) -> Evicted:
    name = str(values.get("evicted", "drop"))
    treatment = dataclass_of(evicted.load(name), values)
    for key in sorted(set(values) - TREATMENTS[name] - _names(method)):
        if others := [other for other, keys in TREATMENTS.items() if key in keys]:
            raise UserError(
                f"{key}={values[key]} has no effect with evicted={name}: it is a setting of evicted={others[0]}"
            )
    treatment.check(method)
    return treatment


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
