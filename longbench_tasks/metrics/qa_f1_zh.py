"""F1 over jieba's tokens of two short Chinese answers, without case, punctuation and white space.

Reference: THUDM/LongBench@2e00731, metrics.py qa_f1_zh_score. Deviations: none; the text is cut before it is
normalised, so punctuation shapes the cut and then drops out.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from . import _jieba
from .qa_f1 import f1

_CHINESE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
_CHINESE += "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE)


def score(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Returns the F1 over normalised tokens; those that normalise to nothing do not count."""
    return f1(_tokens(prediction), _tokens(reference))


def _tokens(text: str) -> list[str]:
    normalised = ("".join(token.lower().translate(_PUNCTUATION).split()) for token in _jieba.cut(text))
    return [token for token in normalised if token]
