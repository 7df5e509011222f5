"""Pieces of novels and of wikitext-2, on which the measurements with real models run (docs/results).

    python scripts/real_texts.py --books 14263.txt 15122.txt 16215.txt 18304.txt 3261.txt --wikitext test.txt \
        --output_path texts

The books are Project Gutenberg's plain texts of these numbers, without its header and licence; wikitext-2's test split
is the tokenised form (wiki.test.tokens), written as ordinary text by lm-eval's own rules. From each, a piece is taken
that begins at a quarter of it and one at two thirds, at the next paragraph or article.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from kv_lm_eval import files

PLACES = {"quarter": 0.25, "two_thirds": 0.667}  # of the text, where a piece begins
CHARACTERS = 60_000  # of a piece: more than any measurement but past_training reads of it


def book(text: str) -> str:
    """A book without Project Gutenberg's header and licence."""
    body = re.split(r"\*\*\* ?START OF.*?\*\*\*", text, maxsplit=1, flags=re.DOTALL)[-1]
    return re.split(r"\*\*\* ?END OF|End of (?:the )?Project Gutenberg", body, maxsplit=1)[0].strip()


def wikitext(text: str) -> str:
    """The tokenised form as ordinary text."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return wikitext_detokenizer({"page": text}).strip()


def pieces(text: str, beginning: str, characters: int) -> dict[str, str]:
    """Of a text, by the place's name; each begins where `beginning` (a pattern) next matches."""
    starts = [m.end() for m in re.finditer(beginning, text)]
    cut = {name: next(at for at in starts if at >= share * len(text)) for name, share in PLACES.items()}
    return {name: text[at : at + characters] for name, at in cut.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, nargs="+", required=True)
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--characters", type=int, default=CHARACTERS, help=f"of a piece, {CHARACTERS} unless said")
    parser.add_argument("--output_path", type=Path, required=True)
    args = parser.parse_args()
    args.output_path.mkdir(parents=True, exist_ok=True)
    texts = {path.stem: (book(read(path)), r"\n\n+") for path in args.books}
    if args.wikitext:
        texts["wikitext2"] = (wikitext(read(args.wikitext)), r"\n(?=\s*= [^=].*[^=] =\s*\n)")
    for name, (text, beginning) in texts.items():
        for place, piece in pieces(text, beginning, args.characters).items():
            path = args.output_path / f"{name}_{place}.txt"
            files.write_whole(path, piece.encode())
            print(path)


def read(path: Path) -> str:
    """With every kind of line end as one line feed, as the perplexity tasks read."""
    return path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")


if __name__ == "__main__":
    main()
