"""Shared by all tests: the helpers in this folder are importable, one thread, fixed seeds."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import browser  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure() -> None:
    if os.environ.get("KV_TEST_DEVICE"):
        from on_device import TensorsOfTests

        TensorsOfTests().__enter__()  # to the end of the process


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts that tests have recorded as a property, summed over them (and over the processes that ran them)."""
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        for name, counts in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
            totals[name].update(counts)
    for name, counts in totals.items():
        said = ", ".join(f"{n} {what}" for what, n in sorted(counts.items(), key=lambda c: -c[1]))
        terminalreporter.write_line(f"{name}: {sum(counts.values())} cases, {said}")


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    """The one browser of all tests that look at a page."""
    if not browser.find():
        pytest.skip("no Chromium here: none by name, none of Playwright's, and no CHROMIUM=PATH")
    page = browser.Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    """Tiny models are slower on two threads than on one; a test that draws numbers draws the same each time."""
    torch = sys.modules.get("torch")  # tests of plain functions need not pay for importing it
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
