"""No message and no docstring breaks off in mid-phrase, as a line breaker leaves it that counts characters.

A text that is spread over several lines of the source fills them: a line ends early only where a sentence or a clause
does. Held for every string of several pieces and for every docstring of the packages.
"""

from __future__ import annotations

import ast
import io
import re
import token
import tokenize
from collections.abc import Iterator
from pathlib import Path

import kv_lm_eval

ROOT = Path(kv_lm_eval.__file__).parents[1]
WIDTH = 120  # of a line of the source
FULL = 100  # columns from which on a line is filled, whatever follows
FILES = sorted(file for folder in ("kv_lm_eval", "longbench_tasks", "needle") for file in (ROOT / folder).rglob("*.py"))
ENDS = re.compile(r"([.:;?!,)]\s+|\\n|</\w+>)$")  # of a piece: a sentence or a clause ends
NOT_FILLED = re.compile(r"([-*|>]|\w[\w, ]*:( |$)|\d|\(|\$|kv-lm-eval|python)")  # lists, arguments, commands


def concatenated(source: str) -> Iterator[list[tuple[int, int, int, str]]]:
    """Strings of several pieces: (line, first and last column, the source) of each."""
    lines, run, depth, start = source.splitlines(), list[tuple[int, int, int, str]](), 0, (0, 0)
    for one in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = token.tok_name[one.type]
        if kind == "FSTRING_START":  # of Python 3.12
            start = start if depth else one.start
            depth += 1
        elif kind == "FSTRING_END":
            depth -= 1
        whole = kind == "STRING" or (kind == "FSTRING_END" and not depth)
        begin = start if kind == "FSTRING_END" else one.start
        if whole and not depth and begin[0] == one.end[0]:
            run.append((one.end[0], begin[1], one.end[1], lines[one.end[0] - 1][begin[1] : one.end[1]]))
        elif not depth and kind not in ("NL", "COMMENT", "FSTRING_END", "STRING"):
            if len(run) > 1:
                yield run
            run = []


def broken_pieces(source: str) -> Iterator[str]:
    for run in concatenated(source):
        texts = [re.sub(r"""^[a-zA-Z]*["']|["']$""", "", raw) for *_, raw in run]
        if any(re.match(r"[bB]?[rR]", raw) for *_, raw in run) or " ".join(texts).count(" ") < 4:
            continue  # a pattern, or no words
        for (line, _, end, _), (next_line, *_), text, after in zip(run, run[1:], texts, texts[1:], strict=False):
            first = re.match(r"(\{[^}]*\}|\S)*\s?", after)
            fits = end + len(first.group() if first else "") <= WIDTH
            if line != next_line and end < FULL and fits and not ENDS.search(text):
                yield f"line {line} breaks off: ...{text[-40:]}"
            if re.search(r"[\w,.;:]$", text) and re.match(r"[\w{]", after):
                yield f"line {line} has no space at its end: ...{text[-40:]}"
            if re.search(r"[^\s\\]  +\S", text) and "\\n" not in text and "{" not in text:
                yield f"line {line} has two spaces: {text}"


def broken_docstrings(source: str) -> Iterator[str]:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) or not ast.get_docstring(node):
            continue
        text = node.body[0]
        for n in range(text.lineno, text.end_lineno or text.lineno):
            line, after = lines[n - 1].rstrip(), lines[n].rstrip()
            alike = len(line) - len(line.lstrip()) == len(after) - len(after.lstrip())
            if not line.strip() or not alike or NOT_FILLED.match(after.strip()) or NOT_FILLED.match(line.strip()):
                continue
            fits = len(line) + 1 + len((after.split() or [""])[0].removesuffix('"""')) <= WIDTH
            if after.strip(' "') and len(line) < FULL and fits and not re.search(r"[.:;!?,)`\\]$", line):
                yield f"line {n} of a docstring breaks off: ...{line[-40:]}"


def test_no_text_breaks_off_in_mid_phrase() -> None:
    sources = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
    broken = {name: [*broken_pieces(text), *broken_docstrings(text)] for name, text in sources.items()}
    assert not {name: complaints for name, complaints in broken.items() if complaints}


def test_the_rule_finds_what_it_forbids() -> None:
    def found(*pieces: str) -> str:
        return "; ".join(broken_pieces("say(\n    " + "\n    ".join(f'"{piece}"' for piece in pieces) + "\n)\n"))

    assert "breaks off" in found("a document of many tokens passes the positions that this ", "model has learned")
    assert not found("a sentence that ends here, at its dot. ", "And another one begins")
    assert not found("long " * 19, "x"), "its line is filled"
    assert "no space" in found("a document of many tokens passes that,", "the model has learned")
    assert "two spaces" in found("a document of  many tokens that passes; ", "the model has learned")
    doc = '"""One line of a docstring that breaks\noff, and goes on."""\n'
    assert list(broken_docstrings(doc)) and not list(broken_docstrings(doc.replace("breaks\n", "breaks.\n")))
