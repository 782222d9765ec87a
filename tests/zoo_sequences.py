"""Embeddings, attention and recurrent networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from zoo_base import First, N, Residual, net, normal


@net(loss="cross_entropy")
def embedding():
    """Integer inputs: dx_0 is empty. The padding row never learns."""
    tokens = torch.tensor([[0, 1, 2], [3, 0, 0], [4, 4, 1], [2, 3, 0]])
    return nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Tanh(), nn.Linear(3, 5)), tokens


class Attention(nn.Module):
    """Self-attention written out: a causal mask sliced by the length, chunk, softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("causal", torch.ones(8, 8).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        shape = (n, length, self.heads, width // self.heads)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.view(*shape).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        scores = scores.masked_fill(~self.causal[:length, :length], float("-inf"))
        mixed = torch.einsum("nhls,nhsd->nhld", scores.softmax(-1), v)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class LanguageModel(nn.Module):
    """Pre-norm blocks, positions, and the output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(5, 4), nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(
            [
                Residual(nn.Sequential(nn.LayerNorm(4), Attention(4, 2))),
                Residual(nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))),
            ]
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@net(loss="cross_entropy")
def language_model():
    return LanguageModel(), torch.randint(5, (N, 3))


@net()
def sdpa_causal():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Model(), normal(N, 3, 4)


def _encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True, **options)


@net(train=True)
def encoder_post_norm():
    return _encoder_layer(dropout=0.3), normal(N, 3, 4)


@net()
def encoder_pre_norm():
    layer = _encoder_layer(norm_first=True, activation=F.gelu, bias=False)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), normal(N, 3, 4)


@net()
def encoder_masked():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(_encoder_layer(), 1)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3))
            self.register_buffer("padding", torch.arange(3) > torch.tensor([[1], [2], [2], [0]]))

        def forward(self, x: Tensor) -> Tensor:
            mask = self.mask.isinf()
            return self.encoder(x, mask=mask, src_key_padding_mask=self.padding)

    return Model(), normal(N, 3, 4)


@net()
def mha_length_first():
    return First(_SelfAttention(nn.MultiheadAttention(4, 2))), normal(3, N, 4)


@net()
def mha_unbatched():
    return First(_SelfAttention(nn.MultiheadAttention(4, 2, batch_first=True))), normal(3, 4)


class _SelfAttention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.attention(x, x, x)


@net()
def mha_mask_per_head():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.register_buffer("mask", torch.rand(2 * N, 3, 3) - torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]

    return Model(), normal(N, 3, 4)


@net()
def mha_weights_used():
    """The averaged attention weights are part of the output."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mixed, weights = self.attention(x, x, x)
            return mixed + weights.sum(1, keepdim=True).mT

    return Model(), normal(N, 3, 4)


@net()
def cross_attention():
    """Several inputs, a key padding mask, and keys of another width in a second attention."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.MultiheadAttention(4, 2, batch_first=True)
            self.other = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
            keys = torch.cat([memory, torch.ones_like(memory[..., :1])], dim=-1)
            x = self.same(x, keys, keys, key_padding_mask=padding, need_weights=False)[0]
            return self.other(x, memory, memory[..., :2])[0]

    padding = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0]]).bool()
    return Model(), (normal(N, 2, 4), normal(N, 3, 3), padding)


@net()
def lstm():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out, (h, _) = self.lstm(x)
            return self.head(torch.cat([out[:, -2], h[-1]], dim=-1))

    return Model(), normal(N, 3, 2)


@net()
def gru():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(2, 3, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0].mean(1)

    return Model(), normal(N, 3, 2)
