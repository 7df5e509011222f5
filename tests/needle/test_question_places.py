"""question_in_prompt=False on the needle tasks: the question begins where its text does, and the needles are before."""

from __future__ import annotations

import pytest

from kv_lm_eval import harness
from kv_lm_eval.requests import boundaries

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("wording", ["plain", "paper"])
def test_every_needle_task_has_its_question_after_its_context(wording):
    metadata = {"tokenizer": "kv-tiny", "lengths": [700], "depths": [100], "samples_per_cell": 1, "wording": wording}
    with harness.task_manager(["kv_needle_all"], None, metadata) as manager:
        tasks = manager.load(["kv_needle_all"])["tasks"]
    assert len(tasks) == 9
    for name, task in tasks.items():
        task.build_all_requests()
        (request,) = task.instances
        prompt, doc = request.args[0], request.doc
        found = boundaries.find(prompt, doc, None, name, lambda text, start: len(text) - start)
        assert prompt[: -found.tail_tokens].rstrip() == doc["context"].rstrip()
        assert prompt[-found.tail_tokens :].startswith(doc["question"].strip())
