"""Build hook: in a wheel the task folders of the repository's root lie in kv_lm_eval/tasks.

An editable installation takes no copies: there kv_lm_eval/tasks/__init__.py finds them where they are.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TASK_FOLDERS = ("longbench_tasks", "needle")


class TaskFolders(BuildHookInterface):
    """Named `custom` in pyproject.toml."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"].update({name: f"kv_lm_eval/tasks/{name}" for name in TASK_FOLDERS})
