"""What decides a task's questions and scores, as far as files say: its YAML files, the code beside them, local data.

Of a task that lies neither in our folders nor in the user's, lm-eval's version says all, which is in every identity; of
a data set of the hub, only its name is known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kv_lm_eval import contents, plugin
from kv_lm_eval.tasks.longbench_tasks.data import VARIABLE


def of(names: Sequence[str], include_path: Any = None) -> dict[str, Any]:
    """Plain values that change with any file that the tasks are made of.

    Args:
        names: tasks, groups, tags, patterns or YAML files. include_path: folders of the user's with task files.
    """
    plugin.install()
    from lm_eval.tasks import TaskManager

    own = [str(path) for path in include_path] if isinstance(include_path, (list, tuple)) else []
    own = [str(include_path)] if isinstance(include_path, (str, Path)) and include_path else own
    with plugin.only_our_tasks():
        manager = TaskManager(include_path=own or None)
    found: dict[str, Any] = {}
    for name in names:
        _find(name, manager, found)
    if any(name.startswith("kv_longbench") for name in found) and (folder := os.environ.get(VARIABLE)):
        found[VARIABLE] = contents.contents(folder)
    return found


def _find(name: str, manager: Any, found: dict[str, Any]) -> None:
    """Adds a task, or the members of a group, tag or pattern."""
    index = manager.task_index
    entry = index.get(name)
    if entry is None and Path(name).is_file():
        found[name] = _files(Path(name))
        return
    if entry is None:
        for match in manager.match_tasks([name]) if "*" in name else ():
            if match not in found:
                _find(match, manager, found)
        return
    found[name] = None if entry.yaml_path is None else _files(Path(entry.yaml_path))
    members = [*sorted(entry.tags if entry.yaml_path is None else ()), *_members((entry.cfg or {}).get("task"))]
    for member in members:
        if member not in found:
            _find(member, manager, found)


def _members(task: Any) -> Iterator[str]:
    """Names in a group's list, whether alone or as mappings with changes."""
    if isinstance(task, list):
        for part in task:
            if isinstance(part, str):
                yield part
            elif isinstance(part, dict):
                yield from _members([part.get("task") or part.get("group")])
                yield from _members(part.get("task"))


def _files(yaml_file: Path) -> dict[str, Any]:
    """Contents of a YAML file and those it includes, the code that they can name, the data files that they name."""
    from lm_eval.tasks._yaml_loader import load_yaml

    chain = _with_includes(yaml_file.resolve(), {})
    ours = [folder for folder in plugin.task_folders() if folder in yaml_file.resolve().parents]
    code = ours or [file for part in chain for file in sorted(part.parent.glob("*.py"))]
    config = load_yaml(yaml_file, resolve_func=False)
    return {
        "yaml": [(file.name, contents.file_digest(file)) for file in chain],
        "code": contents.files_of(dict.fromkeys(code), only=".py"),
        "data": [behind for text in _strings(config) if (behind := contents.contents(text)) is not None],
    }


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _with_includes(file: Path, seen: dict[Path, None]) -> list[Path]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if file not in seen and file.is_file():
        seen[file] = None
        included = load_yaml(file, resolve_func=False, recursive=False).get("include") or []
        for one in included if isinstance(included, list) else [included]:
            _with_includes((file.parent / str(one)).resolve(), seen)
    return list(seen)
