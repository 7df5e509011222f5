"""The rows of LongBench: from a folder of official jsonl files, or from the hub's data.zip, which is cached once."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from kv_lm_eval import files
from kv_lm_eval.errors import UserError, close_names

from . import rows
from .specs import Spec

REPOSITORY = "THUDM/LongBench"  # now also zai-org/LongBench
REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
SHA256 = "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64"  # of data.zip at that revision
VARIABLE = "KV_LM_EVAL_LONGBENCH_DIR"

WHERE = (
    f"Download https://huggingface.co/datasets/{REPOSITORY}/resolve/{REVISION}/data.zip, unpack it, and name the "
    f'folder of its jsonl files: --metadata \'{{"longbench_dir": "FOLDER"}}\' or {VARIABLE}=FOLDER. Where the hub can '
    "be reached (and HF_HUB_OFFLINE is not set), it is downloaded by itself when no folder is named."
)


def load_rows(name: str, folder: str | None = None, spec: Spec | None = None) -> tuple[list[dict[str, Any]], str]:
    """Rows of one file in their order, each with its number in the field `row`, and where they come from.

    Args:
        name: the file without .jsonl: "trec", or "trec_e" for LongBench-E.
        folder: of the jsonl files, or one that holds it as `data`, or data.zip itself. Default: the environment
            variable, else the hub.
        spec: what the rows are for, whose needs are checked too.

    Raises:
        UserError: the file is missing, the hub cannot be reached, or a line is not a row; says what to do.
    """
    folder = folder or os.environ.get(VARIABLE) or None
    if folder is None:
        (text, place), source = _of_zip(_download(), name), f"{REPOSITORY}@{REVISION}"
    else:
        path = Path(folder).expanduser()
        (text, place), source = (_of_zip(path, name) if path.suffix == ".zip" else _of_folder(path, name)), str(path)
    lines = ((f"{place}, line {number}", value) for number, value in files.parse_jsonl(text, place))
    found = [{**row, "row": number} for number, row in enumerate(rows.checked(lines, spec))]
    if not found:
        raise UserError(f"{place} holds no rows. {WHERE}")
    return found, source


def _of_folder(folder: Path, name: str) -> tuple[str, str]:
    """Text and path of a file."""
    for file in (folder / f"{name}.jsonl", folder / "data" / f"{name}.jsonl"):
        if file.is_file():
            return files.read_text(file), str(file)
    there = sorted(p.stem for p in [*folder.glob("*.jsonl"), *folder.glob("data/*.jsonl")]) if folder.is_dir() else []
    what = f"it holds {', '.join(there)}{close_names(name, there)}" if there else "there are no jsonl files"
    raise UserError(f"{name}.jsonl is not in {folder.resolve()}: {what}. {WHERE}")


def _of_zip(archive: Path, name: str) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(archive) as unzipped:
            member = next((n for n in unzipped.namelist() if Path(n).name == f"{name}.jsonl"), None)
            if member is None:
                raise UserError(f"{archive} holds no {name}.jsonl. {WHERE}")
            place = f"{archive}/{member}"
            return files.as_text(unzipped.read(member), place), place
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{archive} could not be read as a zip file: {error}. {WHERE}") from error


@lru_cache(maxsize=1)
def _download() -> Path:
    """The pinned data.zip in the hub's cache, downloaded the first time and checked once a process."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(REPOSITORY, "data.zip", repo_type="dataset", revision=REVISION))
    except Exception as error:  # the hub's own errors, and those of the network below
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"LongBench is neither in a folder nor on the hub within reach ({reason}). {WHERE}") from error
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise UserError(f"{path} has sha256 {digest.hexdigest()}, the official file {SHA256}: delete it and run again")
    return path
