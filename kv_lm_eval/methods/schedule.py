"""WHEN the cache is cut: after the prefill, and then again and again or never.

Two triggers. "clock": time t counts the tokens that a row was fed since its prefill ended (since its first token, where
a whole document is streamed); a cut follows the forward of token t where t is a multiple of R = compress_every.
"excess": a row is cut whenever it holds R slots more than its budget, whatever the time. Where a row starts at its
budget the two are the same. Either way a forward over a segment that ends at a cut equals the token-by-token run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kv_lm_eval.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Cut after the prefill, and every `compress_every` tokens from then on; some layers never."""

    compress_every: int = field(
        default=0, metadata={"help": "cut again every this many tokens fed after the prefill; 0: never again"}
    )
    trigger: str = field(
        default="clock",
        metadata={
            "help": "what compress_every counts: tokens fed (clock), or slots held over the budget (excess)",
            "choices": ("clock", "excess"),
        },
    )
    cache_slack: int = field(
        default=0, metadata={"help": "trigger=excess: slots over the budget that a cut with max_drop may leave"}
    )
    max_drop: int = field(
        default=0,
        metadata={"help": "trigger=excess: slots that a cut drops, as long as no more than cache_slack stay; 0: all"},
    )
    skip_layers: tuple[int, ...] = field(
        default=(), metadata={"help": "indices of layers that are never cut, as [0,1] or 0"}
    )

    def __post_init__(self) -> None:
        if self.compress_every < 0:
            raise UserError(f"compress_every={self.compress_every} is negative; 0 means 'only after the prefill'")
        if any(layer < 0 for layer in self.skip_layers):
            raise UserError(f"skip_layers={list(self.skip_layers)}: layers are counted from 0")
        for name in ("cache_slack", "max_drop"):
            value = getattr(self, name)
            if value < 0:
                raise UserError(f"{name}={value} is negative; it is a number of slots, 0 switches it off")
            if value and not (self.online and self.trigger == "excess"):
                raise UserError(
                    f"{name}={value} has no effect: it shapes the cuts of trigger=excess with compress_every of at "
                    "least 1"
                )

    @property
    def online(self) -> bool:
        """Whether cuts go on after the prefill."""
        return self.compress_every > 0

    def due(self, before: int, after: int) -> bool:
        """trigger=clock: whether a cut follows a forward that took the clock from `before` to `after` tokens."""
        return self.online and before // self.compress_every < after // self.compress_every

    def until_due(self, t: int) -> int:
        """trigger=clock: tokens that may be fed in one forward from t on, so that it ends at the next cut."""
        assert self.online
        return self.compress_every - t % self.compress_every

    def after_cut(self, held: float, target: float) -> float:
        """trigger=excess: slots that a row of `held` slots with a budget of `target` has after its forward.

        The "softlite", version of 2025-12-23 (hopecommon/CS3602@b3ebb26): bounded by target + compress_every
        whatever the other two settings are.
        """
        if held - target < self.compress_every:
            return held
        if not self.max_drop:
            return target
        return min(max(held - self.max_drop, target), target + self.cache_slack)

    def warnings(self) -> list[str]:
        """Settings that do nothing, or not what their names say."""
        r, slack, drop = self.compress_every, self.cache_slack, self.max_drop
        if drop and (drop >= r or not slack):
            why = "is not below compress_every" if drop >= r else "comes with cache_slack=0"
            return [f"max_drop={drop} has no effect: it {why}={r}, so that every cut is a full one"]
        if slack and not drop:
            return [f"cache_slack={slack} only reserves budget: with max_drop=0 every cut is a full one"]
        if drop and slack < r - drop:
            return [
                f"max_drop={drop} is below compress_every={r}: dropping no more than that would let the cache grow "
                f"without bound, so a cut leaves at most cache_slack={slack} slots over the budget and drops "
                f"{r - slack}"
            ]
        return []
