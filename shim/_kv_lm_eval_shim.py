"""Lets a plain `lm_eval --model kvcompressed` find kv-lm-eval.

lm-eval up to 0.4.13 discovers no plug-ins, so something of ours must run when `lm_eval` starts.
This module does as little as it can at interpreter start: it puts one finder on `sys.meta_path`,
which looks at the name of each imported module and acts on two. The work is in kv_lm_eval/plugin.py.
Set KV_LM_EVAL_NO_PLUGIN=1 to switch it off. See README.md beside this file in the source tree.
"""

import os
import sys

HOOKED = ("lm_eval.models", "lm_eval.tasks")


class LmEvalFinder:
    """Hands the import of the two hooked packages to our plug-in and lets all others pass."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in HOOKED:
            return None
        try:
            from kv_lm_eval.plugin import hooked_spec

            return hooked_spec(name, path)
        except Exception as error:
            print(f"kv-lm-eval: not plugged into lm-eval, which works without it: {error!r}", file=sys.stderr)
            return None


def install():
    """Put the finder first on `sys.meta_path`, once, unless the user opted out."""
    opted_out = os.environ.get("KV_LM_EVAL_NO_PLUGIN", "0") not in ("", "0")
    if not opted_out and LmEvalFinder not in sys.meta_path:
        sys.meta_path.insert(0, LmEvalFinder)
