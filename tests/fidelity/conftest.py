"""Evaluations of the embedded model, each made once for all tests of a file."""

from __future__ import annotations

import pytest

from kv_lm_eval import plugin, tiny


@pytest.fixture(scope="module")
def run():
    """simple_evaluate of one task; lm-eval's look at the machine, a `pip list`, is left out."""
    plugin.install()
    import lm_eval
    from lm_eval.tasks import TaskManager

    def evaluate(task, model="kvcompressed", batch=1, use_cache=None, metadata=None, limit=None, **model_args):
        pretrained = "kv-tiny" if model == "kvcompressed" else tiny.path()
        model_args = {"pretrained": pretrained, "dtype": "float32", **model_args}
        with plugin.only_our_tasks():
            index = TaskManager(metadata={**model_args, **(metadata or {})})
        return lm_eval.simple_evaluate(
            model=model, model_args=model_args, tasks=[task], task_manager=index, device="cpu", batch_size=batch,
            bootstrap_iters=0, use_cache=use_cache, limit=limit,
        )  # fmt: skip

    done = {}

    def once(task, **asked):
        key = repr((task, sorted(asked.items())))
        if key not in done:
            done[key] = evaluate(task, **asked)
        return done[key]

    once.anew = evaluate
    from lm_eval import evaluator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        yield once
