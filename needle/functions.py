"""The functions that the YAMLs name. lm-eval runs this file by its path, outside the package, so it holds no code."""

from needle.scoring import grid, process
from needle.tasks import classic, magic, multi, multikey, multiquery, multivalue, prompt, vt
from needle.words import cwe, fwe

__all__ = [
    "classic",
    "cwe",
    "fwe",
    "grid",
    "magic",
    "multi",
    "multikey",
    "multiquery",
    "multivalue",
    "process",
    "prompt",
    "vt",
]
