"""Modules written as functions of their parameters, so that each call meets its own rule.

A module of `torch.nn` without an entry here is one call, linearised by autograd as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..rules.arithmetic import identity
from ..rules.base import register
from ..rules.structural import linear_map

Lowering = Callable[..., Any]

LOWERINGS: dict[type[nn.Module], Lowering] = {}

TRACE_FORWARD: set[type[nn.Module]] = {
    *[nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU],
    *[nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign],
    *[nn.Tanh, nn.Sigmoid, nn.Tanhshrink, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout],
    *[nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d],
    *[nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.MaxPool1d],
    *[nn.MaxPool2d, nn.MaxPool3d, nn.Softmax, nn.LogSoftmax, nn.LayerNorm, nn.RMSNorm],
    *[nn.GroupNorm, nn.Linear, nn.ZeroPad2d, nn.PixelShuffle],
}
"""Modules whose own `forward` can be traced."""


def lowers(*types: type[nn.Module]) -> Callable[[Lowering], Lowering]:
    """Registers the functional form of module types."""

    def decorate(lowering: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(types, lowering))
        return lowering

    return decorate


@lowers(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv(m: Any, x: Any) -> Any:
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(m.kernel_size)]
    padding = m.padding
    if m.padding_mode != "zeros":
        x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
        padding = 0
    return function(x, m.weight, m.bias, m.stride, padding, m.dilation, m.groups)


@lowers(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(m: Any, x: Any) -> Any:
    batch = m.training or m.running_mean is None
    mean, variance = (None, None) if batch else (m.running_mean, m.running_var)
    return F.batch_norm(x, mean, variance, m.weight, m.bias, batch, 0.0, m.eps)


@lowers(nn.Embedding)
def _embedding(m: Any, tokens: Any) -> Any:
    return F.embedding(
        tokens, m.weight, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse
    )


@lowers(nn.MultiheadAttention)
def _attention(
    m: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    if m.bias_k is not None or m.add_zero_attn or not m._qkv_same_embed_dim:
        raise NotImplementedError("attention with bias_k, add_zero_attn or kdim/vdim is one call")
    weight, bias, width = m.in_proj_weight, m.in_proj_bias, m.embed_dim
    if query is key and key is value:
        q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
    else:
        q, k, v = (
            F.linear(
                x,
                weight[i * width : (i + 1) * width],
                None if bias is None else bias[i * width : (i + 1) * width],
            )
            for i, x in enumerate((query, key, value))
        )
    heads = m.num_heads
    q, k, v = (_split_heads(x, heads, m.batch_first) for x in (q, k, v))
    mask = None
    if attn_mask is not None or key_padding_mask is not None:
        mask = _merged_mask(attn_mask, key_padding_mask, q, heads)
    dropout = m.dropout if m.training else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    mixed = F.linear(_join_heads(mixed, m.batch_first), m.out_proj.weight, m.out_proj.bias)
    if m.training and m.batch_first:
        mixed = _length_first_memory(mixed)
    # The attention weights are an output for people, not for the loss.
    return mixed, None


@torch.fx.wrap
def _split_heads(x: Any, heads: int, batch_first: bool) -> Any:
    """(N, L, E), (L, N, E) or (L, E) to (N, heads, L, E / heads) or without N."""
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(-3, -2) if batch_first or x.ndim == 3 else x.movedim(0, -2)


@torch.fx.wrap
def _join_heads(x: Any, batch_first: bool) -> Any:
    """The inverse of `_split_heads`."""
    x = x.transpose(-3, -2) if batch_first or x.ndim == 3 else x.movedim(-2, 0)
    return x.flatten(-2)


@torch.fx.wrap
def _length_first_memory(x: Any) -> Any:
    """The same values in the memory order of the module's own output.

    A dropout that follows draws its mask in that order.
    """
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x


@torch.fx.wrap
def _merged_mask(attn_mask: Any, padding: Any, q: Any, heads: int) -> Any:
    def additive(mask: Any) -> Any:
        if mask.dtype != torch.bool:
            return mask.to(q.dtype)
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))

    total: Any = 0.0
    if attn_mask is not None:
        mask = additive(attn_mask)
        total = mask.unflatten(0, (-1, heads)) if mask.ndim == 3 and q.ndim == 4 else mask
    if padding is not None:
        total = total + additive(padding)[..., None, None, :]
    return total


register(_split_heads, _join_heads)(linear_map)
register(_length_first_memory)(identity)


@lowers(nn.TransformerEncoderLayer)
def _encoder_layer(
    m: Any,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    def attend(x: Any) -> Any:
        mixed = m.self_attn(
            *(x, x, x),
            attn_mask=src_mask,
            key_padding_mask=src_key_padding_mask,
            need_weights=False,
        )[0]
        return m.dropout1(mixed)

    def feed(x: Any) -> Any:
        return m.dropout2(m.linear2(m.dropout(m.activation(m.linear1(x)))))

    if m.norm_first:
        src = src + attend(m.norm1(src))
        return src + feed(m.norm2(src))
    src = m.norm1(src + attend(src))
    return m.norm2(src + feed(src))


@lowers(nn.TransformerEncoder)
def _encoder(
    m: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
) -> Any:
    for layer in m.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return src if m.norm is None else m.norm(src)
