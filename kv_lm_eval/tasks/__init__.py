"""The task folders of kv-lm-eval, found by lm-eval by their path, and imported as parts of this package.

`needle` and `longbench_tasks` lie in this folder in a wheel, and beside `kv_lm_eval` in a checkout. Either way they are
`kv_lm_eval.tasks.needle` and `kv_lm_eval.tasks.longbench_tasks`: a `needle.py` of the user's, or somebody else's
package of that name, is neither imported in their place nor hidden by them.
"""

from pathlib import Path

if not (Path(__file__).parent / "needle").is_dir():
    __path__.append(str(Path(__file__).parents[2]))
