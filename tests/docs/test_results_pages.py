"""The results book agrees with its data: perplexities in its tables are those of the CSV files that a page names."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

BOOK = Path(__file__).parents[2] / "docs" / "results"
PAGES = sorted(page.name for page in BOOK.glob("*.md") if page.name != "README.md")
ROUNDED = re.compile(r"\d+\.\d+")


def tables(text: str) -> Iterator[list[list[str]]]:
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        yield [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]


def in_words_of(number: str, values: list[float]) -> bool:
    """Whether some value is written so when rounded to as many digits."""
    return any(f"{value:.{len(number.partition('.')[2])}f}" == number for value in values)


@pytest.mark.parametrize("page", PAGES)
def test_perplexities_are_those_of_the_csv_files(page: str) -> None:
    text = (BOOK / page).read_text()
    values = [
        float(value)
        for name in re.findall(r"\]\((\w+\.csv)\)", text)
        for row in csv.DictReader((BOOK / name).open())
        for column, value in row.items()
        if column.startswith("perplexity") and value
    ]
    for head, _, *rows in tables(text):
        if values and "perplexity" in head:
            at = head.index("perplexity")
            for row in rows:
                assert not ROUNDED.fullmatch(row[at]) or in_words_of(row[at], values), f"{row[0]}: {row[at]}"


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_what_a_page_links_to_is_there_and_cells_are_short(page: str) -> None:
    text = (BOOK / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (BOOK / target).exists(), target
    for table in tables(text):
        for row in table:
            assert len(row) == len(table[0]) and max(map(len, row)) <= 120, row


def test_the_book_names_all_its_pages() -> None:
    assert set(re.findall(r"\]\((\w+\.md)\)", (BOOK / "README.md").read_text())) >= set(PAGES)
