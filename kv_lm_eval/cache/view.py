"""What the cache shows to a method, and what it asks of one: all that the two know of each other.

`View` goes to the scorer at every cut, `Sight` comes back from methods that hide pairs. The `AskedOf...` protocols are
the members of a compression that the cache reads; `methods/` fulfils them, and `compression.py` there has it proved.

Shapes: B batch rows, H query heads, K KV heads, G = H / K, N slots, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kv_lm_eval.cache.coded import Codec
from kv_lm_eval.cache.moments import QueryMoments
from kv_lm_eval.cache.store import Kept
from kv_lm_eval.cache.transfer import at_least_float32, to_device
from kv_lm_eval.errors import UserError


@dataclass
class View:
    """What a scorer may look at: the slots of one layer, oldest first, at the moment of compression.

    Attributes:
        keys, values: [B, K, N, D], keys with the model's rotary embedding applied.
        pos: [B, 1 or K, N] original position of the token in each slot, -1 where a slot is empty.
        seen: tokens each row has seen so far (host integers, length B).
        keep: slots each row will keep (host integers, length B), already limited to what the row holds; where all
            layers share them their mean, and all that it holds where scores alone decide how many stay.
        layer: index of the layer; num_layers: how many there are.
        bias: [B, K, N] float32 added to the attention logits of each slot, the logarithm of the number of tokens that
            it stands for; None: each stands for one.
        memory: [B, K] float32 what the treatment of the evicted remembers from the last cut, or None.
        scaling: factor of the layer's attention logits, mostly D ** -0.5.
        method: its name, for messages. num_queries: last queries that are kept for it; None: all that are asked for.

    `mass`, `reread`, `moments`, `attention`, `logits`, `queries`, `hidden`, `rotate` and `output_norms` are there for
    methods that declare them: the cache gathers and computes nothing that nobody reads.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pos: torch.Tensor
    seen: list[int]
    keep: list[int]
    layer: int
    num_layers: int
    _mass: torch.Tensor | None
    _attend: Callable[[int], torch.Tensor]
    bias: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    _moments: QueryMoments | None = None
    scaling: float = 1.0
    _rotate: Callable[..., torch.Tensor] | None = None
    method: str = "NAME"
    num_queries: int | None = None
    _votes: dict[int, torch.Tensor] = field(default_factory=dict)
    _logits: Callable[[int], torch.Tensor] | None = None
    _queries: tuple[torch.Tensor, torch.Tensor] | None = None
    _output_norms: Callable[[], torch.Tensor] | None = None
    _hidden: torch.Tensor | None = None

    @property
    def mass(self) -> torch.Tensor:
        """[B, K, N] float32 attention each key has received from all queries so far, mean over the query heads of its
        group; for methods with `accumulates = True`."""
        if self._mass is None:
            raise self._undeclared("view.mass, the attention received so far", "accumulates = True")
        return self._mass

    @property
    def reread(self) -> torch.Tensor:
        """[B, K, N] float32 largest attention that each slot received while its tokens were read again, of any query of
        its group; for methods with `reads_again = True`."""
        if self._mass is None:
            raise self._undeclared("view.reread, the attention of tokens read a second time", "reads_again = True")
        return self._mass

    @property
    def moments(self) -> QueryMoments:
        """Mean and covariance of the queries before their rotary embedding; for methods with `moments_from`."""
        if self._moments is None:
            raise self._undeclared(
                "view.moments, mean and covariance of the queries",
                "a property moments_from: the position from which on queries count, 0 for all",
            )
        return self._moments

    def _undeclared(self, what: str, remedy: str) -> UserError:
        return UserError(
            f"method={self.method} reads {what}, which is gathered only for methods that declare it; give its class "
            f"{remedy}"
        )

    def rotate(self, x: torch.Tensor, delta: torch.Tensor, over: int = 1) -> torch.Tensor:
        """Keys or queries [B, K, N, D] moved by delta positions ([B, N], [B, 1] or [B, K, N]); mean over `over` of
        them from there on. Only for methods with `rotates = True`, or where something else moves keys."""
        if self._rotate is None:
            raise self._undeclared(
                "view.rotate, which moves keys in position",
                "rotates = True, or a property moments_from (or use evicted=compensate,key_space=pre_rope)",
            )
        return self._rotate(x, delta, over)

    def attention(self, last: int) -> torch.Tensor:
        """Attention weights of the `last` most recent queries over the slots: [B, K, G, last, N], float32.

        Causal by position. A row that has seen fewer tokens has zeros for the queries that it lacks. For methods with
        a `num_queries` of at least `last`.
        """
        self._keeps(last, "attention")
        return self._attend(last)

    def logits(self, last: int) -> torch.Tensor:
        """What `attention` is the softmax of, scaled, capped and biased as in the layer: [B, K, G, last, N] float32;
        minus infinity where a query does not see a slot, and for queries that a row lacks."""
        self._keeps(last, "logits")
        assert self._logits is not None
        return self._logits(last)

    def _keeps(self, last: int, what: str) -> None:
        if self.num_queries is not None and last > self.num_queries:
            raise self._undeclared(
                f"view.{what}({last}), the {what} of the last {last} queries, and keeps {self.num_queries}",
                f"a property num_queries that returns {last}",
            )

    def outputs(self, last: int) -> torch.Tensor:
        """What the `last` most recent queries read from the slots, attention times values: [B, K, G, last, D], float32;
        for methods with a `num_queries` of at least `last`."""
        return self.attention(last) @ at_least_float32(self.values).unsqueeze(2)

    def queries(self, last: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The `last` most recent queries with their rotary embedding, [B, K, G, q, D], and their positions, [B, q].

        Fewer where fewer were seen; None: all that are held, which with `every_query = True` are those since the last
        cut and the `num_queries` before them.
        """
        if self._queries is None or (last or 0) > (self.num_queries or 0):
            raise self._undeclared(
                f"view.queries({'' if last is None else last}), and keeps {self.num_queries or 0} of them",
                f"a property num_queries that returns {last or 'how many'}",
            )
        queries, pos = self._queries
        if last is not None:
            queries, pos = queries[:, :, -last:], pos[:, -last:]
        return queries.unflatten(1, (self.keys.shape[1], -1)), pos

    def output_norms(self) -> torch.Tensor:
        """Sum of the absolute values of what each slot's value is behind the layer's output projection, mean over the
        query heads of its group: [B, K, N] float32; for methods with `projects = True`."""
        if self._output_norms is None:
            raise self._undeclared("view.output_norms, values behind the layer's output projection", "projects = True")
        return self._output_norms()

    @property
    def hidden(self) -> torch.Tensor:
        """Hidden states that the layer's queries, keys and values were made of, for the newest q slots: [B, q, M]. In
        `note` of methods with `reads_hidden = True`; they are not kept until a cut."""
        if self._hidden is None:
            raise self._undeclared(
                "view.hidden, what the layer's queries, keys and values were made of",
                "reads_hidden = True, and read it in note(view), whose numbers score finds in view.remembered",
            )
        return self._hidden

    @property
    def remembered(self) -> torch.Tensor | None:
        """[B, K, N] what the method gave `remember` at the last cut, 0 for slots that came later, or its `note` for
        each; None: nothing yet."""
        return self._mass

    def remember(self, numbers: torch.Tensor) -> None:
        """Keeps a number [B, K, N], float32, with each slot that stays until the next cut, as `remembered`; for methods
        that do not read `mass`, in the place of which it is held."""
        self._mass = numbers

    def votes(self, last: int) -> torch.Tensor:
        """What each slot received of `attention(last)`: summed over the queries, mean over the query heads of a group:
        [B, K, N]. Worked out once, for the scores and for the treatment of the evicted."""
        if last not in self._votes:
            self._votes[last] = self.attention(last).sum(3).mean(2)
        return self._votes[last]

    def recent(self, count: int | list[int]) -> torch.Tensor:
        """True for the last `count` tokens seen (one number, or one a row): [B, 1 or K, N]."""
        counts = [count] * len(self.seen) if isinstance(count, int) else count
        first = [seen - c for seen, c in zip(self.seen, counts, strict=True)]
        return self.pos >= to_device(first, self.pos.device).view(-1, 1, 1).clamp_min(0)

    def first(self, count: int) -> torch.Tensor:
        """True for the first `count` tokens of each row: [B, 1 or K, N]."""
        return (self.pos >= 0) & (self.pos < count)


@dataclass(frozen=True)
class Sight:
    """What the query heads of a layer may see where a method hides pairs instead of dropping them.

    Attributes:
        sinks: first tokens of the sequence, one entry per query head or one for all.
        windows: most recent tokens, the query's own included, in the same way; None: all.
    """

    sinks: tuple[int, ...]
    windows: tuple[int | None, ...]


@dataclass(frozen=True)
class Pages:
    """What a query that follows on a prompt reads of a layer where a method lets it choose.

    Attributes:
        size: tokens of a page. most: pages that each query head reads, those whose keys could give it most.
        dense_layers: the first so many layers are read in whole.
    """

    size: int
    most: int
    dense_layers: int


class AskedOfMethod(Protocol):
    """The scorer: what it must be shown, and what kind of cache it needs."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def compresses(self) -> bool:
        """False: everything is kept."""

    @property
    def uses_cache(self) -> bool:
        """False: the model recomputes everything."""

    @property
    def ring(self) -> bool:
        """A new token overwrites the oldest."""

    @property
    def reinserted(self) -> int:
        """How many of the tokens that a cut drops go to the end of the cache."""

    @property
    def hides(self) -> bool:
        """Pairs beyond the budget stay and are hidden by `sight`."""

    @property
    def pages(self) -> Pages | None:
        """What a query reads of what is held; None: all of it."""

    @property
    def per_query_head(self) -> bool:
        """Every query head has keys and values of its own."""

    @property
    def sinks_and_recent(self) -> int | None:
        """First tokens that stay with the most recent ones and nothing else; None: scores choose."""

    @property
    def in_cache_sinks(self) -> int:
        """First tokens whose keys follow the window in position; 0: positions stay true."""

    @property
    def accumulates(self) -> bool:
        """It reads `view.mass`."""

    @property
    def num_queries(self) -> int:
        """It reads `view.attention` or `view.queries` of so many last queries."""

    @property
    def every_query(self) -> bool:
        """It reads `view.queries` of all since the last cut too."""

    @property
    def projects(self) -> bool:
        """It reads `view.output_norms`."""

    @property
    def reads_hidden(self) -> bool:
        """Its `note` reads `view.hidden` after every forward."""

    def note(self, view: View) -> torch.Tensor:
        """A number for each new token, [B, K, q], that is held with its slot as `view.remembered`."""

    @property
    def reads_again(self) -> bool:
        """It reads `view.reread`, for which tokens are fed a second time before each cut."""

    @property
    def reads_effects(self) -> bool:
        """Its `view.reread` is attention times what values do behind the output projection."""

    @property
    def reread_sinks(self) -> int:
        """First tokens that these see beside the slots in question."""

    @property
    def moments_from(self) -> int | None:
        """It reads `view.moments` of the queries from that position on; None: it does not."""


class AskedOfSchedule(Protocol):
    """When the cache is cut."""

    @property
    def online(self) -> bool:
        """Cuts go on after the prefill."""

    @property
    def compress_every(self) -> int:
        """Tokens, or slots over the budget, from cut to cut."""

    @property
    def trigger(self) -> str:
        """Which of the two: "clock" or "excess"."""

    @property
    def skip_layers(self) -> tuple[int, ...]:
        """Layers that are never cut."""

    def due(self, before: int, after: int) -> bool:
        """Clock: whether a cut follows a forward that took it from `before` to `after` tokens."""

    def until_due(self, t: int) -> int:
        """Clock: tokens from t to the next cut."""


class AskedOfStorage(Protocol):
    """In what form pairs are held."""

    @property
    def quantises(self) -> bool:
        """Some pairs are held in fewer bits."""

    @property
    def words(self) -> str:
        """The setting that asks for it, for messages."""

    @property
    def step(self) -> int:
        """Pairs that change their form together."""

    @property
    def residual_length(self) -> int:
        """Newest pairs per head that stay as they are."""

    @property
    def keys(self) -> Codec:
        """How keys are coded."""

    @property
    def values(self) -> Codec:
        """How values are coded."""

    @property
    def watches(self) -> int:
        """It codes keys by what so many last queries ask of them; 0: by themselves."""

    def of_queries(self, keys: torch.Tensor, real: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
        """What all keys of a head are coded by from now on, [B, K, ...] by name, for those that watch queries: from all
        keys [B, K, N, D] that are real [B, K, N] and the last queries [B, H, W, D]."""

    def due(self, before: int, after: int) -> bool:
        """Whether a row that went from `before` to `after` tokens seen now codes the pairs that wait."""

    def until_due(self, seen: int) -> int:
        """Tokens until a row that has seen `seen` codes pairs next."""


class AskedOfEvicted(Protocol):
    """What becomes of the pairs that go."""

    @property
    def forgets(self) -> bool:
        """The pairs that stay are left as they are."""

    def cut(self, method: Any, view: View, scores: torch.Tensor, counts: torch.Tensor) -> Kept:
        """What the layer holds from now on; method: the compression's own, scores [B, 1 or K, N], counts [B, 1 or K]
        slots per row and head on the host."""


class AskedOfCompression(Protocol):
    """A method with its budget, schedule, storage and treatment of the evicted."""

    @property
    def method(self) -> AskedOfMethod:
        """The scorer."""

    @property
    def schedule(self) -> AskedOfSchedule:
        """When it cuts."""

    @property
    def storage(self) -> AskedOfStorage:
        """In what form pairs are held."""

    @property
    def evicted(self) -> AskedOfEvicted:
        """What becomes of the pairs that go."""

    @property
    def open(self) -> bool:
        """How many slots a layer keeps is known only when they are scored."""

    @property
    def ranks_layers(self) -> bool:
        """The slots of all layers are ranked together."""

    @property
    def waits(self) -> bool:
        """No layer is cut before the last one has attended."""

    @property
    def moves_keys(self) -> object:
        """None: no key is moved in position, and no rotary embedding is needed."""

    @property
    def exact(self) -> bool:
        """Whether a row keeps exactly its budget, mean over the heads."""

    @property
    def slotwise(self) -> bool:
        """A slot's score is the same wherever it stands, so that cuts may leave holes."""

    def score(self, view: View) -> torch.Tensor:
        """[B, 1 or K, N], higher stays."""

    def second_look(self, view: View, scores: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [B, 1 or K, N] and counts [B, 1 or K] by which slots are chosen, once it is known how many each head
        keeps by the first ones."""

    def keep(
        self, seen: list[int], held: list[float], layer: int, layers: Sequence[int], most: int | None = None
    ) -> list[float]:
        """Slots each row may keep in a layer; layers: all that share a budget; most: pairs its window shows."""

    def after_forward(
        self,
        seen: list[int],
        held: list[float],
        clock: tuple[int, int],
        layer: int,
        layers: Sequence[int],
        most: int | None = None,
    ) -> list[float] | None:
        """The same after a forward that took the schedule's clock from the one to the other; None: no cut is due."""

    def counts(
        self,
        scores: torch.Tensor,
        pos: torch.Tensor,
        keep: list[float],
        seen: list[int],
        held: list[float],
        layer: int,
    ) -> torch.Tensor:
        """Slots per row and head that a cut leaves, [B, 1 or K] on the host."""

    def counts_of_layers(
        self, scores: Sequence[torch.Tensor], pos: Sequence[torch.Tensor], seen: list[int]
    ) -> list[torch.Tensor]:
        """The same of all layers together, [B, 1 or K] on the host for each."""

    def mean(self, seen: list[int]) -> list[int]:
        """Slots per head that each row may keep, mean over the layers that share them."""

    def uniform(self, layer: int) -> bool:
        """Whether all heads of the layer keep the same number of slots."""

    def sight(self, layer: int) -> Sight | None:
        """What the queries of a layer may see of what is held; None: all."""

    def in_view(self, seen: int, held: float, layer: int, layers: Sequence[int]) -> float:
        """Slots of those held that count as kept."""

    def over_budget(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens keeps more than its budget, since some slots always stay."""
