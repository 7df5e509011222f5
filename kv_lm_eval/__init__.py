"""Evaluate KV-cache compression with lm-evaluation-harness.

Public names load on first use, so that `import kv_lm_eval` costs no torch import: it happens whenever lm-eval starts.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "KVCompressedLM": "kv_lm_eval.model",
    "UserError": "kv_lm_eval.errors",
    "compress": "kv_lm_eval.serving.compress",
    "compressed_cache": "kv_lm_eval.serving.compress",
    "evaluate": "kv_lm_eval.api",
    "prefill": "kv_lm_eval.serving.context",
}

__all__ = ["KVCompressedLM", "UserError", "__version__", "compress", "compressed_cache", "evaluate", "prefill"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
