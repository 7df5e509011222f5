"""What a release says of itself agrees: the version, the Pythons, and the formats of results that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

import kv_lm_eval
from kv_lm_eval import versions
from kv_lm_eval.reporting import load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "reporting"))
from results import FULL, mean_task, run  # noqa: E402


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == kv_lm_eval.__version__ and cited["license"] == "Apache-2.0"


def test_the_package_is_typed_and_its_public_names_are_there():
    assert (ROOT / "kv_lm_eval" / "py.typed").is_file()
    assert all(getattr(kv_lm_eval, name) is not None for name in kv_lm_eval.__all__)


def test_results_of_every_earlier_format_are_read_and_later_ones_are_refused(tmp_path):
    for written in (None, *range(versions.RESULTS_FORMAT + 2)):
        file = run(tmp_path / str(written), FULL, {"one": mean_task([1.0, 0.0])})
        results = json.loads(file.read_text(encoding="utf-8"))
        if written is not None:
            results["config"]["kv_format"] = written
        file.write_text(json.dumps(results), encoding="utf-8")
    found = load.read(tmp_path)
    assert len(found.runs) == 2 + versions.RESULTS_FORMAT
    (refused,) = found.said.damaged
    assert f"format {versions.RESULTS_FORMAT + 1}" in refused and "install the newer one" in refused
