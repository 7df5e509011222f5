"""A loaded model object is lent: what is put on it for a run is taken off again, whatever happens in between.

Several LM objects may share one model, ours and lm-eval's own, in any order. So nothing of ours stays on it between two
calls: our attention function, a generate() without a cache, a bounded view are context managers around each call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kv_lm_eval.cache import hook
from kv_lm_eval.cache.cache import CompressedCache
from kv_lm_eval.engine.forward import cache_argument, forward_of

Call = dict[str, Any]  # arguments of a forward, by name
_MISSING = object()


@contextmanager
def as_found(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's attention function may be chosen (`check.wrap` does); afterwards it is as it was."""
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]
    wrapped = "_kv_own_attention" in model.__dict__
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        if not wrapped:
            model.__dict__.pop("_kv_own_attention", None)


@contextmanager
def our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, every forward runs through our attention function and needs a CompressedCache."""
    hook.register()
    with as_found(model):
        model.set_attn_implementation(hook.NAME)
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, this object's generate() recomputes everything at each token, whatever its caller asks for.

    Args:
        model: the object whose generate() is called: the adapter's, where there is one.
    """
    original: Any = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "use_cache": False})

    with replaced(model, "generate", generate):
        yield


@contextmanager
def see_last(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Inside, a forward sees the last `length` of its tokens [B, n], at positions from 0 on, padding aside.

    For generate() without a cache, whichever way it (or an adapter around it) prepares its inputs.
    """

    def cut(call: Call) -> Call:
        ids, mask = call["input_ids"], call.get("attention_mask")
        mask = (torch.ones_like(ids) if mask is None else mask)[:, -length:]
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        bounded = {"input_ids": ids[:, -length:], "attention_mask": mask, "position_ids": positions}
        return {**{k: v for k, v in call.items() if k != "cache_position"}, **bounded}

    with each_forward(model, cut):
        yield


@contextmanager
def in_format(models: Iterable[nn.Module], dtype: torch.dtype | None, device: str) -> Iterator[None]:
    """Inside, each forward of these objects runs under torch.autocast in this format, and nothing else does: what is
    scored, coded and compared between two forwards keeps the formats that it asks for. None: nothing changes.

    Args:
        device: the kind of device, "cpu" or "cuda".
    """
    if dtype is None:
        yield
        return

    with ExitStack() as put_on:
        put_on.enter_context(torch.autocast(device, enabled=False))  # keeps weights that were cast until the last exit
        for model in models:
            put_on.enter_context(replaced(model, "forward", under_autocast(model.forward, dtype, device)))
        yield


def under_autocast(forward: Callable[..., Any], dtype: torch.dtype | None, device: str) -> Callable[..., Any]:
    """A forward that runs in this format; the same one for None."""
    if dtype is None:
        return forward

    @wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=dtype):
            return forward(*args, **kwargs)

    return cast


@contextmanager
def each_forward(model: PreTrainedModel, change: Callable[[Call], Call]) -> Iterator[None]:
    """Inside, `change` sees what every forward hands to the layers and says what they get instead.

    At the module below the output layer, because adapters may keep the model's own forward() and call that.
    """
    names = list(inspect.signature(model.base_model.forward).parameters)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
        return (), change({**dict(zip(names, args, strict=False)), **kwargs})

    handle = model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the object has another attribute of its own by this name."""
    own = owner.__dict__.get(name, _MISSING)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if own is _MISSING:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = own


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every configuration in which an attention function can be named, each once."""
    found: dict[int, PreTrainedConfig] = {}

    def note(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for key in config.sub_configs:
                note(getattr(config, key, None))

    for module in model.modules():
        note(getattr(module, "config", None))
    return list(found.values())


@contextmanager
def starting_anew(model: PreTrainedModel, cache: CompressedCache | None) -> Iterator[None]:
    """Inside, a generate() whose model gives up its cache prefills the same one again, with all tokens so far.

    Models whose rotation is another beyond some length (longrope) do so when they pass it: keys that were rotated for a
    short sequence are of no use for a long one. The whole sequence is then a prompt, cut as prompts are.
    """
    if cache is None or cache.facts.border is None:
        yield
        return
    original: Any = model.prepare_inputs_for_generation
    name = cache_argument(forward_of(model))

    def prepare(*args: Any, **kwargs: Any) -> Call:
        inputs: Call = original(*args, **kwargs)
        if inputs.get(name) is None and kwargs.get("use_cache", True):
            cache.reset()
            inputs[name] = cache
        return inputs

    with replaced(model, "prepare_inputs_for_generation", prepare):
        yield
