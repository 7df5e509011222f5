"""What decides an answer, as one hash: `--use_cache`, a sweep's resume, the tuner's scores and kept baselines use it.

By construction, not by a list of what matters: everything that reached the constructor, every file that it names, the
code that computes, the versions, and (once there is a model) what was loaded. Left out is only what stands in
`WITHOUT_EFFECT`, each with its reason; an argument that a later lm-eval adds is in from the start. A difference that
does not matter costs a second run, one that is missed costs a wrong number: so whatever cannot be read is taken to be
equal to nothing, not even to itself.

`before_loading` needs no weights; `of_loaded` is the same and what only a loaded model shows.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from kv_lm_eval import __version__, tiny
from kv_lm_eval.errors import UserError

_WHERE = "where the weights lie, not what they are"
_FROM = "where files come from: their contents count"
WITHOUT_EFFECT: dict[str, str] = {
    "device": "answers differ by rounding alone",
    "batch_size": "an answer does not depend on its neighbours",
    "max_batch_size": "an answer does not depend on its neighbours",
    **dict.fromkeys(("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "device_map"), _WHERE),
    **dict.fromkeys(("max_memory", "offload_buffers", "offload_state_dict", "low_cpu_mem_usage"), _WHERE),
    **dict.fromkeys(("cache_dir", "token", "force_download", "local_files_only"), _FROM),
}
PACKAGES = ("lm_eval", "transformers", "torch", "tokenizers", "peft", "accelerate", "safetensors")
# Of this package
COMPUTES = ("cache", "engine", "methods", "requests", "model.py", "config.py", "settings.py", "coerce.py")
LARGE_BYTES = 2**20  # files from here on are read once for as long as they are not touched
Described = Any  # plain values for JSON


def digest(what: Any) -> str:
    """Hash of plain values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def before_loading(model_args: Mapping[str, Any], model: str = "kvcompressed") -> dict[str, Described]:
    """What decides an answer and is known before a weight is loaded.

    Args:
        model_args: of lm-eval, as they stand in a configuration or on the command line. model: lm-eval's name of it.
    """
    arguments: dict[str, Any] = dict(model_args)
    if model == "kvcompressed":
        from kv_lm_eval import config

        try:
            compression, engine, rest = config.parse(arguments)
            arguments = {
                **rest,
                "settings": {**compression.settings(), **vars(engine)},
                "code": type(compression.method),
            }
        except UserError:  # told where the settings are checked
            pass
    return {"model": model, **_asked(arguments)}


def of_loaded(lm: Any) -> dict[str, Described]:
    """The same of a KVCompressedLM, with everything that was loaded."""
    arguments = {**lm.arguments, "settings": lm.settings, "code": type(lm.compression.method)}
    return {"model": "kvcompressed", **_asked(arguments), "loaded": _loaded(lm)}


def _asked(arguments: Mapping[str, Any]) -> dict[str, Described]:
    """Arguments after lm-eval's defaults, with the contents of what they name; versions and code."""
    known = {**_defaults(), **arguments}
    if isinstance(known.get("pretrained"), str):
        known["pretrained"] = tiny.resolve(known["pretrained"])
    where: dict[str, Any] = {k: known.get(k) for k in ("revision", "cache_dir", "subfolder")}
    counted = {name: value for name, value in known.items() if name not in WITHOUT_EFFECT}
    return {
        "arguments": {name: describe(value, **where) for name, value in counted.items()},
        "code": our_code(),
        "versions": {"kv-lm-eval": __version__, **{name: _version(name) for name in PACKAGES}},
    }


@cache
def our_code() -> str:
    """Hash of what computes answers: a checkout changes under one version."""
    return digest(files_of([Path(__file__).parent / part for part in COMPUTES], only=".py"))


def _defaults() -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    parameters = inspect.signature(HFLM.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------- any value


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
        behind = contents(text, **where) if names else None
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
        found[file.as_posix()] = file_digest(file)
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


# ---------------------------------------------------------------------------------------------------- files


def contents(
    name: str, revision: str | None = None, cache_dir: str | None = None, subfolder: str | None = None, **_: Any
) -> Described | None:
    """What stands behind a string: a file, a folder, a name of the hub; None: it is only a string."""
    if not name or len(name) > 4096 or "\n" in name or "\0" in name:
        return None
    path = Path(name).expanduser()
    in_file = Path(name.rpartition(":")[0]).expanduser()  # method=path/to/file.py:Class
    try:
        for file in (path, in_file):
            if file.is_file():
                return file_digest(file)
        if path.is_dir():
            if "/" in name or any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
                return folder_contents(path, subfolder or "")
            return None
    except OSError:
        return None
    return hub_contents(name, revision or "main", cache_dir, subfolder or "")


def folder_contents(folder: Path, subfolder: str = "") -> Described:
    """Contents of the files of a folder: of a model what loading may read, of anything else all that is in it."""
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        return files_of([folder])
    found = _model_files(folder)
    if subfolder:
        found += _model_files(folder / subfolder)
    return files_of(found, relative_to=folder)


def _model_files(folder: Path) -> list[Path]:
    """Files at the top, named chat templates, and shards that an index names: not checkpoints and results below."""
    if not folder.is_dir():
        return []
    found = [file for file in folder.iterdir() if file.is_file()]
    found += [file for file in folder.glob("additional_chat_templates/*") if file.is_file()]
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue
        found += [file for shard in shards if (file := folder / str(shard)).is_file() and file not in found]
    return found


def hub_contents(name: str, revision: str, cache_dir: str | None = None, subfolder: str = "") -> Described | None:
    """The commit of a name of the hub, and those of its files here that are no longer what the commit says."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return None

    repo = Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    if not repo.is_dir() and "/" not in name:
        return None  # a word, as most arguments are
    commit = _commit(name, revision, repo)
    if commit is None:
        return None
    snapshot = repo / "snapshots" / commit
    files = [*_model_files(snapshot), *(_model_files(snapshot / subfolder) if subfolder else [])]
    changed = [file for file in files if not _is_whole_blob(file)]
    return {"commit": commit, "changed": files_of(changed, relative_to=snapshot)}


@cache
def _asks_hub(name: str, revision: str) -> str | None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().model_info(name, revision=revision, timeout=5).sha
    except (HfHubHTTPError, OSError, ValueError, RuntimeError):
        return None
    except Exception:  # of the HTTP client, which differs between versions
        return None


def _commit(name: str, revision: str, repo: Path) -> str | None:
    """What a revision is now: on the hub, since loading would fetch that; else in the cache."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    ref = repo / "refs" / revision
    if "/" in name or repo.is_dir():
        from kv_lm_eval.loading import hub_is_reachable

        if hub_is_reachable() and (commit := _asks_hub(name, revision)):
            return commit
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None


def _is_whole_blob(file: Path) -> bool:
    """Whether a file of the hub's cache holds what its blob's name says: SHA-256 of large files, else git's SHA-1."""
    blob = file.resolve().name if file.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return file_digest(file) == blob
    if re.fullmatch(r"[0-9a-f]{40}", blob):
        data = file.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == blob
    return False


def files_of(paths: Iterable[Path], only: str = "", relative_to: Path | None = None) -> list[tuple[str, str]]:
    """(name, SHA-256) of files and of all files below folders, without hidden ones; read in parallel."""
    named: dict[str, Path] = {}
    for path in paths:
        below = [path] if not path.is_dir() else [file for file in path.rglob("*") if file.is_file()]
        for file in below:
            inside = file.relative_to(path if path.is_dir() else path.parent)
            if file.suffix == only or (not only and not any(part.startswith(".") for part in inside.parts)):
                name = file.relative_to(relative_to) if relative_to else Path(path.name) / inside
                named[name.as_posix()] = file
    files = sorted(named.items())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(zip((name for name, _ in files), pool.map(file_digest, (f for _, f in files)), strict=True))


_read_before: dict[tuple[Any, ...], str] = {}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    try:
        stat = path.stat()
        # The time of the last change of the file or its times: it cannot be set back
        key = (path.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if key in _read_before:
            return _read_before[key]
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(LARGE_BYTES):
                content.update(block)
        found = content.hexdigest()
    except OSError as error:
        return f"unreadable {error.errno} {uuid.uuid4().hex}"
    if stat.st_size >= LARGE_BYTES and time.time_ns() - stat.st_ctime_ns > 2 * 10**9:  # times have steps
        _read_before[key] = found
    return found


# ---------------------------------------------------------------------------------------------------- what was loaded


def _loaded(lm: Any) -> dict[str, Described]:
    model, outer = lm.causal_lm, lm.model
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    return {
        "class": [describe(type(part)) for part in (outer, model)],
        "config": describe(model.config.to_dict(), False),
        "attention": str(model.config._attn_implementation),
        "generation_config": describe(model.generation_config.to_dict() if model.generation_config else None, False),
        "dtypes": dtypes,
        "adapters": describe({str(k): c.to_dict() for k, c in getattr(outer, "peft_config", {}).items()}, False),
        "tokenizer": tokenizer(lm.tokenizer),
        "lengths": [lm.max_length, lm.max_gen_toks],
        "prefix_token_id": lm.prefix_token_id,
        "chat_template_args": describe(lm.chat_template_args, False),
        "weights": None if isinstance(lm.pretrained, str) else state(outer),
    }


def tokenizer(of: Any) -> dict[str, Described]:
    """Vocabulary, rules, special tokens, templates and flags of a tokenizer."""
    plain = (str, int, float, bool, type(None), list, tuple, dict)
    # What a call leaves behind, and the file that it was loaded from, whose contents are in the rest
    passing = {"deprecation_warnings", "name_or_path", "init_kwargs", "verbose"}
    backend = getattr(of, "backend_tokenizer", None)
    if backend is None:
        files = [str(v) for k, v in (getattr(of, "init_kwargs", None) or {}).items() if k.endswith("_file") and v]
        rules: Any = [sorted(of.get_vocab().items()), [file_digest(Path(f)) for f in files if Path(f).is_file()]]
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
