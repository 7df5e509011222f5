"""The versions of what we build on: those in use, and the range that the tests have been run with."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from kv_lm_eval import __version__

# The lowest and the highest version that .ci/run tries (its jobs `floors` and `newest`).
TRIED = {"transformers": ("5.20.0", "5.24.0"), "lm-eval": ("0.4.12", "0.4.13"), "torch": ("2.13.0", "2.13.0")}

# Of what this package adds to a results file (config.kv_...). It goes up when a key changes its meaning or goes, so
# that an older reader refuses the file, and this one reads every earlier file; files without the number are format 0.
# 0: before the number was written. 1: the same keys.
RESULTS_FORMAT = 1


def in_use() -> dict[str, str]:
    """Goes into results files: this package, what it builds on, and `untried`, where a version is outside of what the
    tests have been run with."""
    found = {package: version(package) for package in TRIED}
    untried = [
        f"{package} {found[package]} (tried: {low} to {high})"
        for package, (low, high) in TRIED.items()
        if not Version(low).release <= Version(found[package]).release <= Version(high).release
    ]
    return {"kv-lm-eval": __version__, **found, **({"untried": "; ".join(untried)} if untried else {})}
