"""What we need to know of a model, found out by looking at it run: no list of model classes anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from kv_lm_eval.cache.rope import RopeKit
from kv_lm_eval.errors import UserError


@dataclass(frozen=True)
class Words:
    """How a method says something to the model, in token ids.

    Attributes:
        encode: ids of a text, as it goes on within a prompt. head, tail: what the chat format puts before a user's
            message, and after it until the answer; nothing where there is no such format.
    """

    encode: Callable[[str], list[int]]
    head: Sequence[int] = ()
    tail: Sequence[int] = ()


@dataclass
class ModelFacts:
    """The model as the cache needs to know it.

    Attributes:
    num_layers: attention layers.
    modules: attention module of each layer, filled at the first forward.
    outputs: by layer, the module that gets the attention's output, where there is one: the output projection.
    heads: query heads and KV heads of each layer, filled with the modules; sizes: numbers of a key of each.
    sliding_windows: the layer's own sliding window in tokens, None for full attention.
    rope: rotation by the model's own functions; rope_kinds: per layer "rope", "nope" (keys do not depend on the
        position) or "other", only where a method asked for it.
    qk_norm: whether keys are normalised before they are cached.
    max_positions: trained context in tokens, if the configuration says.
    border: tokens of a sequence beyond which the rotation of all its tokens is another (dynamic NTK, longrope); None:
        a token is rotated by its position alone.
    settles: whether the rotation beyond the border is one and the same.
    words: how a method may say something to the model, where a tokenizer is known.
    ranks: processes that hold an equal share of every layer's heads each (tensor parallelism); bytes are of all.
    """

    num_layers: int
    max_positions: int | None = None
    modules: dict[int, nn.Module] = field(default_factory=dict)
    outputs: dict[int, nn.Module] = field(default_factory=dict)
    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    sliding_windows: list[int | None] = field(default_factory=list)
    rope: RopeKit | None = None
    rope_kinds: list[str] = field(default_factory=list)
    border: int | None = None
    settles: bool = False
    words: Words | None = None
    ranks: int = 1

    def __post_init__(self) -> None:
        self.sliding_windows = self.sliding_windows or [None] * self.num_layers

    def meet(
        self, layer: int, module: nn.Module, sliding_window: int | None, heads: tuple[int, int], size: int
    ) -> None:
        """Notes a layer's attention module, its query and KV heads and the size of these, when it is first seen."""
        if layer not in self.modules:
            self.modules[layer] = module
            self.heads[layer], self.sizes[layer] = heads, size
            self.sliding_windows[layer] = sliding_window

    def rotates(self, layer: int) -> bool:
        """Whether keys of the layer are moved by rotating them; False: they do not depend on positions.

        Raises:
            UserError: nothing has asked the model yet.
        """
        if not self.rope_kinds:
            raise UserError(
                "this model was wrapped for a method that leaves keys where they are, and now keys are to be moved, "
                "which nobody has tried on it: wrap it for the method that is run, or take positions=absolute"
            )
        return self.rope_kinds[layer] == "rope"

    def compressible(self, layer: int) -> bool:
        """Sliding-window layers are bounded already and left alone, unless the model has no others."""
        return self.sliding_windows[layer] is None or all(w is not None for w in self.sliding_windows)

    def beyond(self, tokens: int) -> bool:
        """Whether the rotation of a sequence of so many tokens depends on their number: it is run alone, since a
        forward rotates all of its rows by the longest."""
        return self.border is not None and tokens > self.border

    def until_border(self, seen: int, tokens: int) -> int:
        """How many of the next tokens may be one forward, so that each is rotated as if it came alone."""
        if self.border is None or seen + tokens <= self.border:
            return tokens
        if seen < self.border:
            return self.border - seen
        return tokens if self.settles else 1

    @property
    def cut_layers(self) -> list[int]:
        """The compressible layers."""
        return [i for i in range(self.num_layers) if self.compressible(i)]

    @property
    def all_sliding(self) -> bool:
        return all(w is not None for w in self.sliding_windows)

    @property
    def qk_norm(self) -> bool:
        return any(
            "k_norm" in name or "k_layernorm" in name for m in self.modules.values() for name, _ in m.named_children()
        )
