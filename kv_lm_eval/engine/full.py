"""The full cache as one compression among others: what methods are compared with, and prompts read under."""

from __future__ import annotations

from kv_lm_eval.methods.budget import Everything
from kv_lm_eval.methods.compression import Compression
from kv_lm_eval.methods.evicted import Drop
from kv_lm_eval.methods.full import Full
from kv_lm_eval.methods.schedule import Schedule

FULL = Compression(Full(), Everything(), Schedule(), Drop())
