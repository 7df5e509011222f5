"""Writes the tables of methods in README.md and docs/methods.md: what there is, and what each does to kv-tiny.

Usage:
    python scripts/methods_doc.py                                   # whether they are what the method files say
    python scripts/methods_doc.py --write                           # after a method was added or changed
    python scripts/methods_doc.py --measure --methods snapkv random # and their measured rows, a minute a method
    python scripts/methods_doc.py --measure                         # all of them, half an hour on a core
"""

from __future__ import annotations

from kv_lm_eval.experiments.method_tables import main

if __name__ == "__main__":
    raise SystemExit(main())
