"""The rows of a benchmark that is none of LongBench's data sets: a file, a folder's file, or the hub's at a commit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_lm_eval import files
from kv_lm_eval.errors import UserError

Placed = tuple[str, Any]  # where a row stands, for errors, and the row as it was read


@dataclass(frozen=True)
class Source:
    """Where a benchmark's rows may lie.

    Args:
        benchmark: its name in words. repository: on the hub.
        key: of --metadata: a folder, a file, or hub@COMMIT.
        files: names in the folder or in its `data`, of which the first that is there is read (.json, .jsonl).
        of_hub: what (repository, commit) holds, as it is.
        advice: what to download, to end an error with.
    """

    benchmark: str
    repository: str
    key: str
    files: Sequence[str]
    of_hub: Callable[[str, str], Iterable[Any]]
    advice: str

    def read(self, where: str | None) -> tuple[list[Placed], str]:
        """The rows in their order, unchecked, and where they come from.

        Raises:
            UserError: there are none; says what to do.
        """
        if where is None:
            raise UserError(f"where is {self.benchmark}? {self.advice}")
        found, source = self._hub(where) if where.startswith("hub") else self._folder(Path(where).expanduser())
        if not found:
            raise UserError(f"{source} holds no rows. {self.advice}")
        return found, source

    def _folder(self, path: Path) -> tuple[list[Placed], str]:
        places = [folder / name for name in self.files for folder in (path, path / "data")]
        file = path if path.is_file() else next((place for place in places if place.is_file()), None)
        if file is None:
            neither = self.files[0] if len(self.files) == 1 else f"neither {' nor '.join(self.files)}"
            is_not = "is not" if len(self.files) == 1 else "is"
            raise UserError(f"{self.key}={path}: {neither} {is_not} in {path.resolve()}. {self.advice}")
        return list(_of_file(file)), str(file)

    def _hub(self, where: str) -> tuple[list[Placed], str]:
        revision = where.partition("@")[2]
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise UserError(f"{self.key}={where}: name a commit by its 40 digits. {self.advice}")
        source = f"{self.repository}@{revision}"
        try:
            data = list(self.of_hub(self.repository, revision))
        except UserError:
            raise
        except Exception as error:  # whatever datasets and the hub raise
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(f"{self.key}={where} could not be loaded ({reason}). {self.advice}") from error
        return [(f"{source}, row {n}", row) for n, row in enumerate(data)], source


def _of_file(file: Path) -> Iterator[Placed]:
    if file.suffix == ".jsonl":
        yield from ((f"{file}, line {n}", row) for n, row in files.read_jsonl(file))
    else:
        rows = files.read_json(file, list[Any])
        yield from ((f"{file}, row {n}", row) for n, row in enumerate(rows))


def of_data_set(repository: str, revision: str, configuration: str | None = None, split: str = "test") -> Iterable[Any]:
    """Rows of a data set of the hub that `datasets` can read."""
    from datasets import load_dataset

    return load_dataset(repository, configuration, split=split, revision=revision)


def of_hub_file(repository: str, revision: str, name: str) -> Iterable[Any]:
    """Rows of a file of a data set of the hub."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
    return [row for _, row in files.read_jsonl(path)]
