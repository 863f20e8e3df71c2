"""Visibility between tokens: block partitions and block-causal visibility as pure tensor functions.

A partition gives every token the number of its block; -1 marks padding. A query sees the keys of its own block and of
earlier ones (arXiv 2604.16514, figure 3b). Nothing here knows of a model.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask

from .attention_bard_vl import ATTENTION_NAME

PADDING_BLOCK = -1


def partition_prompt(attention_mask: torch.Tensor, block_size: int) -> torch.Tensor:
    """Block of every real token, counted from the first real token of its row.

    Args:
        attention_mask: (batch, length), 1 for real tokens, 0 for padding on the left.
        block_size: tokens per block.

    Returns:
        (batch, length) block numbers, -1 for padding.
    """
    real = attention_mask.bool()
    blocks = (real.long().cumsum(-1) - 1) // block_size
    return blocks.masked_fill(~real, PADDING_BLOCK)


def block_visibility(query_blocks: torch.Tensor, key_blocks: torch.Tensor) -> torch.Tensor:
    """Block-causal visibility.

    Args:
        query_blocks: (batch, queries) blocks of the last `queries` of the keys.
        key_blocks: (batch, keys) blocks of all tokens, -1 for padding.

    Returns:
        (batch, queries, keys) bool. Padding sees itself alone, so that no row of a softmax is empty.
    """
    visible = (key_blocks[:, None, :] <= query_blocks[:, :, None]) & (key_blocks[:, None, :] != PADDING_BLOCK)
    queries, keys = query_blocks.shape[1], key_blocks.shape[1]
    itself = torch.eye(queries, keys, dtype=torch.bool, device=visible.device).roll(keys - queries, dims=1)
    return visible | itself


def to_attention_mask(visible: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """Turn boolean visibility into the 4-D mask that an attention implementation takes.

    Args:
        visible: (batch, queries, keys), or (batch, 1 or heads, queries, keys).
        implementation: name of the attention implementation.
        dtype: of an additive mask.

    Raises:
        ValueError: Bard-VL does not support the attention implementation.
    """
    check_attention_implementation(implementation)
    visible = visible[:, None] if visible.ndim == 3 else visible
    if implementation != "eager":
        return visible
    # Eager attention adds its mask: a boolean one would be silently wrong.
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def check_attention_implementation(implementation: str | None) -> None:
    """Raise `ValueError` for attention implementations that would ignore our mask."""
    if implementation not in (ATTENTION_NAME, "sdpa", "eager"):
        raise ValueError(
            f"Bard-VL's text layers support the attention implementations '{ATTENTION_NAME}' (default), 'sdpa' and "
            f"'eager', not {implementation!r}; "
            "the vision tower may have another: attn_implementation={'text_config': 'sdpa', 'vision_config': ...}"
        )


def check_explicit_mask(mask: torch.Tensor, batch: int, queries: int, keys: int) -> None:
    """Raise `ValueError` unless a 4-D mask is boolean or additive, and (batch or 1, any, queries, keys)."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"a 4-D `attention_mask` must be boolean, or floating to be added, got {mask.dtype}")
    if mask.shape[0] not in (1, batch) or tuple(mask.shape[2:]) != (queries, keys):
        raise ValueError(
            f"a 4-D `attention_mask` must be (batch, heads, queries, keys) = ({batch}, 1, {queries}, {keys}), "
            f"got shape {tuple(mask.shape)}"
        )


def check_block_mask(mask: BlockMask, implementation: str, batch: int, queries: int, keys: int) -> None:
    """Raise `ValueError` unless the attention takes a `BlockMask`, and it is (batch or 1, any, queries, keys)."""
    if implementation != ATTENTION_NAME:
        raise ValueError(f"a `BlockMask` needs the attention {ATTENTION_NAME!r}, not {implementation!r}")
    if mask.shape[0] not in (1, batch) or tuple(mask.shape[2:]) != (queries, keys):
        raise ValueError(
            f"the `BlockMask` must be (batch, heads, queries, keys) = ({batch}, 1, {queries}, {keys}), "
            f"got shape {tuple(mask.shape)}"
        )
