"""What stands behind a name: the contents of a file, of a folder, or of a model of the hub, as hashes.

Whatever cannot be read is taken to be equal to nothing, not even to itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

LARGE_BYTES = 2**20  # files from here on are read once for as long as they are not touched
Described = Any  # plain values for JSON


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
