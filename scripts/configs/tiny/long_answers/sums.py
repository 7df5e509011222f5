"""Documents of long_sums."""

from __future__ import annotations

import random
from typing import Any

import datasets

NAMES = ("Tom", "Mary", "John", "Anna")


def rows(**_: Any) -> dict[str, datasets.Dataset]:
    """Forty sums of three numbers, always the same."""
    draw = random.Random(7)
    made = []
    for i in range(40):
        first, more, gone = draw.randint(10, 40), draw.randint(2, 20), draw.randint(1, 9)
        asked = f"{NAMES[i % 4]} has {first} apples, buys {more} more and eats {gone}. How many apples are left?"
        made.append({"question": asked, "answer": str(first + more - gone)})
    return {"test": datasets.Dataset.from_list(made)}
