"""`F.embedding`: rows picked from a table; integer inputs carry no tangent."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Call, Node, Scales, Slot, Tangents, plain, register
from .gram import Deltas, Term
from .picked import Picked


class EmbeddingNode(Node):
    """y_i = W[token_i].

    The padding row is read but never learned: autograd gives it no gradient, so here it gets no
    tangent either, and B' stays the transpose of B.
    """

    couples_batch = False
    per_sample = True

    def __init__(self, call: Call, tokens: Tensor, weight: Slot, padding: int | None) -> None:
        super().__init__(call.evaluate(), [weight])
        self.tokens = tokens
        self.shape = weight.value.shape
        if padding is not None:
            padding %= self.shape[0]
        self.learned = None if padding is None else (tokens != padding).unsqueeze(-1)

    def push(self, tangents: Tangents) -> Tensor:
        """dW[token]."""
        (dw,) = tangents
        assert dw is not None
        picked = dw[:, self.tokens]
        return picked if self.learned is None else picked * self.learned

    def reads_none_of(self, storages: Collection[int]) -> bool:
        """True: the tokens are all that is read."""
        return True

    def pull(
        self, cotangent: Tensor, needed: Sequence[bool], out: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Cotangents summed into the rows of their tokens."""
        c = cotangent if self.learned is None else cotangent * self.learned
        k = len(c)
        total = c.new_zeros(k, *self.shape)
        flat = c.reshape(k, -1, self.shape[1])
        return [total.index_add(1, self.tokens.reshape(-1), flat)]

    def gram_terms(self, deltas: Deltas, scales: Scales) -> list[Term] | None:
        """Two samples meet where they have a token in common."""
        (scale,) = scales
        if scale is None:
            return []
        values = deltas.values.reshape(*deltas.values.shape[:2], -1, self.shape[1])
        tokens = deltas.select(self.tokens.reshape(deltas.batch, -1))
        learned = self.learned
        if learned is not None:
            learned = deltas.select(learned.reshape(deltas.batch, -1))
        return [Picked.of(values, tokens, learned, scale)]


@register(F.embedding)
def embedding(call: Call) -> Node | None:
    """Rule of `F.embedding(input, weight, padding_idx, max_norm, ...)`."""
    tokens, weight = call.argument(0, "input"), call.argument(1, "weight")
    if call.argument(3, "max_norm") is not None or call.argument(5, "scale_grad_by_freq", False):
        raise NotImplementedError(
            f"embedding in '{call.owner}' uses max_norm or scale_grad_by_freq, which change the "
            "weights or the gradient as a side effect: switch them off for curvature."
        )
    if isinstance(tokens, Slot) or not isinstance(weight, Slot):
        return None
    assert isinstance(tokens, torch.Tensor)
    return EmbeddingNode(call, plain(tokens), weight, call.argument(2, "padding_idx"))
