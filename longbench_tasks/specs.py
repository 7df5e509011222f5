"""What a dataset is: the section `longbench` of a task YAML, readable without lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from kv_lm_eval.errors import UserError, close_names

FOLDER = Path(__file__).parent
CATEGORIES = {
    "single_doc_qa": "Single-document QA",
    "multi_doc_qa": "Multi-document QA",
    "summarization": "Summarization",
    "few_shot": "Few-shot learning",
    "synthetic": "Synthetic",
    "code": "Code completion",
}


@dataclass(frozen=True)
class Spec:
    """One dataset.

    Args:
        dataset: name of the data file, `<dataset>.jsonl`, and of the predictions file.
        category: one of CATEGORIES, or another one of your own, which enters no average.
        language: en, zh or code (which counts in the English and in the Chinese average).
        metric: a file of metrics/, or package.module:function.
        max_gen_toks: longest answer in tokens.
        prompt: a `str.format` text over the fields of a row.
        chat_template: whether a chat template may be put around the prompt.
        first_line_only: whether only the first line of an answer is scored.
        stop_at_newline: whether the newline token ends an answer of at least one token.
        extra_metrics: further metrics, computed where `longbench_extra_metrics` is set.
    """

    dataset: str
    category: str
    language: str
    metric: str
    max_gen_toks: int
    prompt: str
    chat_template: bool = True
    first_line_only: bool = False
    stop_at_newline: bool = False
    extra_metrics: tuple[str, ...] = ()

    @classmethod
    def from_section(cls, section: Mapping[str, Any], where: str) -> Spec:
        """Builds it from YAML; `where` names the task in errors."""
        known = {field.name for field in fields(cls)}
        for key in section:
            if key not in known:
                raise UserError(
                    f"{where}: unknown key {key!r} under `longbench`{close_names(key, known)}; it takes "
                    f"{', '.join(sorted(known))}"
                )
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in section]:
            raise UserError(f"{where}: `longbench` needs {', '.join(missing)}")
        return cls(**{**section, "extra_metrics": tuple(section.get("extra_metrics", ()))})

    def from_question(self, row: Mapping[str, Any]) -> str:
        """The prompt's text from the question on, without white space around it; empty where a row asks none.

        What follows the context is the same for all rows of a data set without questions.
        """
        if "{input}" not in self.prompt or not str(row.get("input", "")).strip():
            return ""
        return self.prompt[self.prompt.rindex("{input}") :].format(**row).strip()


@lru_cache(maxsize=1)
def official() -> dict[str, Spec]:
    """The 21 official datasets by name."""
    import yaml

    found = {}
    for file in sorted((FOLDER / "tasks").glob("*.yaml")):
        section = yaml.safe_load(file.read_text(encoding="utf-8"))["longbench"]
        found[section["dataset"]] = Spec.from_section(section, file.name)
    return found


def official_e() -> list[str]:
    """Names of the 13 datasets of LongBench-E."""
    return sorted(file.stem for file in (FOLDER / "tasks_e").glob("*.yaml"))
