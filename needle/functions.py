"""The functions that the YAMLs name. lm-eval runs this file by its path, outside the package, so it holds no code."""

from kv_lm_eval import quiet
from kv_lm_eval.tasks.needle.scoring import grid, process
from kv_lm_eval.tasks.needle.tasks import classic, magic, multi, multikey, multiquery, multivalue, prompt, vt
from kv_lm_eval.tasks.needle.words import cwe, fwe

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
quiet.install()
