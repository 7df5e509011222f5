"""The documents of the perplexity tasks: from the hub, or from local files with no network at all.

Each document is {"name", "text", "words", "bytes"}: the text that a model scores, and the counts of the original text
that word and byte perplexities divide by.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kv_lm_eval.errors import UserError
from kv_lm_eval.files import check, read_text
from kv_lm_eval.metrics.perplexity import count_words

LINE_ENDS = "\\n"  # whatever the file has
WIKITEXT_FILES = ("wiki.test.raw", "wiki.test.tokens", "test.raw", "test.txt")


def document(name: str, text: str, original: str | None = None) -> dict[str, Any]:
    """One row; `original` where the scored text is another one."""
    original = text if original is None else original
    return {"name": name, "text": text, "words": count_words(original), "bytes": len(original.encode())}


def files(where: Any) -> list[dict[str, Any]]:
    """Text files, one document each: a path, a folder (its *.txt, sorted), or a list of these."""
    if not where:
        raise UserError(
            'this task scores your own text: add --metadata \'{"text_files": ["book.txt"]}\' (a file, a folder of '
            "*.txt files, or a list of them)"
        )
    paths = [Path(str(p)).expanduser() for p in (where if isinstance(where, (list, tuple)) else [where])]
    found = [file for path in paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if missing := [str(p) for p in found if not p.is_file()]:
        raise UserError(f"text_files: {missing[0]} is not a file (looked from {Path.cwd()})")
    if not found:
        raise UserError(f"text_files={where}: there is no *.txt file in it")
    return [document(file.name, read(file)) for file in found]


def read(file: Path) -> str:
    """The text of a file as every reader of ours reads it (files.py): no byte order mark, line ends as LINE_ENDS."""
    text = read_text(file)
    if not text.strip():
        raise UserError(f"{file} is empty: there is nothing to score")
    return text


def wikitext(name: str, folder: str | None, joined: bool) -> list[dict[str, Any]]:
    """The test split of a wikitext.

    By document, it is the text of lm-eval's `wikitext`: detokenised, counted before that. Joined, it is one document of
    all lines with an empty line between any two, as in the strided recipe of the transformers documentation.

    Args:
        name: configuration on the hub, "wikitext-2-raw-v1". folder: local files instead of the hub.
    """
    if joined:
        lines = _wikitext_lines(name, folder)
        return [document(name, "\n\n".join(lines))]
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    if folder:
        pages = list(_pages("".join(_wikitext_lines(name, folder, keep_empty=True))))
    else:
        pages = [row["page"] for row in _hub("EleutherAI/wikitext_document_level", name, "wikitext_dir", "page")]
    return [document(f"{name}:{i}", wikitext_detokenizer({"page": p}), original=p) for i, p in enumerate(pages)]


def _wikitext_lines(name: str, folder: str | None, keep_empty: bool = False) -> list[str]:
    if not folder:
        return [row["text"] for row in _hub("Salesforce/wikitext", name, "wikitext_dir", "text")]
    base = Path(folder).expanduser()
    places = [base / sub / file for sub in (name, name.removesuffix("-v1"), ".") for file in WIKITEXT_FILES]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        raise UserError(f"wikitext_dir={folder} has none of {', '.join(WIKITEXT_FILES)}, nor has {base / name}")
    lines = [f"{line}\n" for line in read(file).removesuffix("\n").split("\n")]
    # The hub's rows: each line with its end; lines of white space alone as empty text.
    return lines if keep_empty else [line if line.strip() else "" for line in lines]


def _pages(text: str) -> Iterator[str]:
    """Articles: each begins at a first-level heading, " = Title = "."""
    page: list[str] = []
    for line in text.split("\n"):
        level_one = line.strip().replace("= = =", "===").replace("= =", "==")
        if level_one.startswith("= ") and level_one.endswith(" ="):
            if "".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


def pg19(folder: str | None, books: int) -> list[dict[str, Any]]:
    """The first books of PG19's test split; from a folder, of its *.txt by name (numbers in numerical order)."""
    if books < 1:
        raise UserError(f"books={books} must be at least 1")
    if folder:
        found = sorted(Path(folder).expanduser().glob("*.txt"), key=lambda f: (f.stem.zfill(20), f.stem))
        if not found:
            raise UserError(f"pg19_dir={folder} has no *.txt file")
        return [document(file.stem, read(file)) for file in found[:books]]
    rows = _hub("emozilla/pg19-test", None, "pg19_dir", "text", books)
    return [document(str(row.get("short_book_title", i)), row["text"]) for i, row in enumerate(rows)]


def _hub(path: str, name: str | None, local: str, field: str, most: int | None = None) -> list[dict[str, Any]]:
    """The first rows of a test split on the hub, each with text in `field`."""
    from datasets import load_dataset

    try:
        rows = list(islice(load_dataset(path, name, split="test"), most))
    except Exception as error:  # whatever datasets and the hub raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"{path} could not be loaded ({reason}). Without a network, give a folder of its files: "
            f'--metadata \'{{"{local}": "FOLDER"}}\''
        ) from error
    for i, row in enumerate(rows):
        check(row.get(field), str, f"{path}, row {i}, {field}")
    return rows
