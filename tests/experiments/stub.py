"""A model for tests of everything around it: answers that depend on the prompt alone, at once, and kept one by one."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry

NAME = "kv-test-stub"


class Stub(LM):
    def __init__(self, pretrained: str = "kv-tiny", wait_s: float = 0.0, **_: Any) -> None:
        super().__init__()
        self.wait_s = wait_s

    def _answer(self, text: str) -> str:
        time.sleep(self.wait_s)
        return str(int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100000)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        out = []
        for request in requests:
            out.append(self._answer(request.args[0]))
            self.cache_hook.add_partial("generate_until", request.args, out[-1])
        return out

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        out = []
        for request in requests:
            out.append((-float(self._answer("".join(request.args))) / 1e4, False))
            self.cache_hook.add_partial("loglikelihood", request.args, out[-1])
        return out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def register() -> None:
    import lm_eval.models  # noqa: F401

    if NAME not in model_registry:
        model_registry.register(NAME, target=Stub)
