"""Attention of the text layers: no mask inside a block, none repeated keys and values, registered under our own name.

Inside a block every query sees the whole prefix and its block, so scaled dot-product attention needs no mask and its
flash kernels apply. transformers' own `sdpa` would attend causally without a mask.
"""

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .compat_bard_vl import register_attention

# Registered for the whole process, where copies of this file may meet: another calling convention takes another name.
ATTENTION_NAME = "bard_vl"


def block_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    num_clean: int | None = None,
    padded_places: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' calling convention.

    Args:
        module: the attention layer, unused.
        query: (batch, heads, queries, head size).
        key, value: (batch, key/value heads, keys, head size).
        attention_mask: (batch, 1, queries, keys) boolean, or floating to be added, or a `BlockMask` for
            FlexAttention; None where `num_clean` says that every query sees every key.
        scaling: of the products, 1 / sqrt(head size) by default.
        dropout: of the weights, in training.
        num_clean: without a mask, the first so many queries do not see the keys of the queries behind them: a finished
            block in front of the next one. Only the text layers need it, the vision tower attends without masks.
        padded_places: (tokens,) if the queries are rows of different lengths end to end, (1, heads, tokens, head size),
            the place of each in the (rows x queries) of the mask; keys and values are (rows, ...).

    Returns:
        (batch, queries, heads, head size), and None for the weights.

    Raises:
        ValueError: text without a mask, who sees whom is then unknown; dropout under a `BlockMask`.
    """
    if attention_mask is None and num_clean is None and getattr(module, "is_causal", False):
        raise ValueError(f"the attention {ATTENTION_NAME!r} of text layers needs a 4-D mask: call the whole model")
    if isinstance(attention_mask, BlockMask):
        output = attend_sparsely(query, key, value, attention_mask, scaling, dropout)
    elif attention_mask is not None and padded_places is not None:
        rows, width = attention_mask.shape[0], attention_mask.shape[2]
        padded = query.new_zeros(rows * width, query.shape[1], query.shape[3])
        padded[padded_places] = query[0].transpose(0, 1)
        padded = padded.unflatten(0, (rows, width)).transpose(1, 2)
        output = attend(padded, key, value, attention_mask, scaling, dropout)
        return output.transpose(1, 2).flatten(0, 1)[None, padded_places], None
    elif attention_mask is None and num_clean:
        hidden = key.shape[2] - (query.shape[2] - num_clean)
        clean = attend(query[:, :, :num_clean], key[:, :, :hidden], value[:, :, :hidden], None, scaling, dropout)
        behind = attend(query[:, :, num_clean:], key, value, None, scaling, dropout)
        output = torch.cat([clean, behind], dim=2)
    else:
        output = attend(query, key, value, attention_mask, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Grouped-query attention with the heads of a group as further queries of their shared keys.

    So the keys and values are neither repeated nor copied, only a mask is; in windows so wide that the repeated mask
    would be larger, keys and values are repeated.
    """
    batch, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    if mask is not None and groups > 1:
        if queries > 2 * key.shape[1] * size:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            groups = 1
        else:
            mask = mask.expand(batch, 1, queries, key.shape[2]).repeat(1, 1, groups, 1)
    query = query.reshape(batch, heads // groups, groups * queries, size)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, heads, queries, size)


def attend_sparsely(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Grouped-query attention that skips the tiles of which the mask shows nothing."""
    if dropout:
        raise ValueError(f"FlexAttention has no dropout of attention weights, got {dropout}: give a dense mask")
    # As scaled dot-product attention does under autocast, where the norms leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    kernel = flex_kernel
    if query.is_cuda:
        kernel = _fused_flex_kernel(query.shape[1], key.shape[1], torch.is_grad_enabled())
    return kernel(query, key, value, mask, scaling)


def flex_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scaling: float | None
) -> Any:
    """FlexAttention with shared or own keys and values."""
    shared = query.shape[1] != key.shape[1]
    return flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=shared)


@cache
def _fused_flex_kernel(*variant: Any) -> Callable[..., Any]:
    """Compiled once a variant (heads, gradients); uncompiled, FlexAttention would hold all scores in memory.

    Lengths and rows make a few compilations of each, so that a student, a teacher and evaluation together pass the
    limit of a function.
    """
    return torch.compile(with_own_code(flex_kernel))


def with_own_code(function: Any) -> Any:
    """A copy with a code object of its own: dynamo counts compilations by code object, and stops at eight."""
    code = function.__code__.replace(co_name=f"own_{function.__name__}")
    return types.FunctionType(code, function.__globals__, function.__name__)


register_attention(ATTENTION_NAME, block_attention)

__all__ = ["ATTENTION_NAME", "block_attention", "with_own_code"]
