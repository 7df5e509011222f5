"""The suite's independent loops, which the tests on real models run on real weights."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("methods", "engine", "real"))
