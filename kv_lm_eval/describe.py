"""Any value as plain ones that are equal exactly where the value is: settings, code, tensors, tokenizers, models.

Whatever cannot be read is taken to be equal to nothing, not even to itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from kv_lm_eval import contents

Described = Any  # plain values for JSON


def digest(what: Any) -> str:
    """Hash of plain values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def describe(value: Any, names: bool = True, **where: Any) -> Described:
    """A value as plain ones that are equal exactly where the value is.

    Args:
        names: whether a string may name a file, a folder or a model of the hub, and then brings its contents.
        where: `revision`, `cache_dir` and `subfolder` of names of the hub.
    """
    import torch
    from transformers import PreTrainedTokenizerBase

    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        behind = contents.contents(text, **where) if names else None
        return text if behind is None else {"name": text, "contents": behind}
    if isinstance(value, Mapping):
        return {"mapping": [[describe(k, False), describe(v, names, **where)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [describe(part, names, **where) for part in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(digest(describe(part, names, **where)) for part in value)}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, torch.Tensor):
        return tensors([("", value)])
    if isinstance(value, torch.nn.Module):
        return {"class": _name(type(value)), "state": state(value)}
    if isinstance(value, PreTrainedTokenizerBase):
        return tokenizer(value)
    if isinstance(value, type):
        return {"class": _name(value), "code": code_of(value)}
    for plain in ("to_dict", "__getstate__"):
        of = getattr(value, plain, lambda: None)()
        if isinstance(of, Mapping):
            return {"class": _name(type(value)), "of": describe(of, names, **where)}
    return {"unreadable": _name(type(value)), "equal to nothing": uuid.uuid4().hex}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def code_of(cls: type) -> Described:
    """The source files of a class, its bases, and what they take from files of the same folder; not of packages."""
    found: dict[str, Described] = {}
    todo = [module for base in cls.__mro__ if (module := sys.modules.get(base.__module__)) is not None]
    folders = {Path(m.__file__).resolve().parent for m in todo if _is_own(m)}  # type: ignore[arg-type]
    while todo:
        module = todo.pop()
        if not _is_own(module):
            continue
        file = Path(module.__file__).resolve()  # type: ignore[arg-type]
        if file.as_posix() in found or not any(folder in file.parents for folder in folders):
            continue
        found[file.as_posix()] = contents.file_digest(file)
        for part in list(vars(module).values()):
            used = part if isinstance(part, ModuleType) else sys.modules.get(getattr(part, "__module__", None) or "")
            if used is not None:
                todo.append(used)
    return sorted(found.values())


def _is_own(module: ModuleType) -> bool:
    """Whether a module is a file of the user's: an installed package is known by its version, ours by `COMPUTES`."""
    file = getattr(module, "__file__", None)
    if not file or not file.endswith(".py"):
        return False
    path = Path(file).resolve()
    installed = {Path(folder).resolve() for folder in (sys.prefix, sys.base_prefix, Path(__file__).parent)}
    return not any(folder in path.parents for folder in installed)


def tokenizer(of: Any) -> dict[str, Described]:
    """Vocabulary, rules, special tokens, templates and flags of a tokenizer."""
    plain = (str, int, float, bool, type(None), list, tuple, dict)
    # What a call leaves behind, and the file that it was loaded from, whose contents are in the rest
    passing = {"deprecation_warnings", "name_or_path", "init_kwargs", "verbose"}
    backend = getattr(of, "backend_tokenizer", None)
    if backend is None:
        files = [str(v) for k, v in (getattr(of, "init_kwargs", None) or {}).items() if k.endswith("_file") and v]
        rules: Any = [
            sorted(of.get_vocab().items()),
            [contents.file_digest(Path(f)) for f in files if Path(f).is_file()],
        ]
    else:  # all but padding and truncation, which stand before the tokens and are set by each call
        rules = backend.to_str().partition('"added_tokens"')[2]
    flags = {
        name: value
        for name, value in vars(of).items()
        if name not in passing
        and isinstance(value, plain)
        and not (backend is not None and isinstance(value, (list, dict)) and len(value) > 1000)  # is in the rules
    }
    return {
        "class": describe(type(of)),
        "flags": digest(describe(flags, False)),
        "rules": digest(rules),
        "special": digest([str(of.special_tokens_map), of.all_special_ids]),
        "added": digest({str(k): repr(v) for k, v in getattr(of, "added_tokens_decoder", {}).items()}),
        "chat_template": digest(describe(getattr(of, "chat_template", None), False)),
    }


def state(module: Any) -> Described:
    """All parameters and buffers of a module, by name, and the plain attributes of its parts (scales, flags)."""
    import torch

    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    bookkeeping = vars(torch.nn.Module())
    plain = [
        (name, {k: v for k, v in vars(part).items() if k not in bookkeeping and _is_plain(v)})
        for name, part in module.named_modules()
    ]
    return {"tensors": tensors(named), "attributes": digest(describe(plain, False))}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


def tensors(named: Iterable[tuple[str, Any]]) -> Described:
    """Names, types, shapes and every byte of tensors; one that is not here (offloaded, sharded) equals nothing."""
    import torch

    plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    all_of = hashlib.sha256()
    for name, tensor in named:
        about = [name, str(tensor.dtype), list(tensor.shape), type(tensor).__name__]
        all_of.update(json.dumps(about).encode())
        codes = getattr(tensor, "quant_state", None)  # what turns bitsandbytes' codes into weights
        if tensor.is_meta or (type(tensor) not in plain and not hasattr(codes, "as_dict")):
            return {"unreadable": name, "equal to nothing": uuid.uuid4().hex}
        all_of.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if codes is not None:
            all_of.update(digest(describe(codes.as_dict(packed=True), False)).encode())
    return all_of.hexdigest()
