"""Attention for the text layers: no mask within a block, no repeated keys or values.

In decoding, queries come in slots: a slot is a block of queries of one row, all of which see the first `length` keys of
that row. Nothing is masked or padded, whatever the lengths of the rows. In whole forwards there is a mask.
transformers' own `sdpa` would attend causally without one.
"""

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from . import kernel_bard_vl
from .compat_bard_vl import register_attention

# Registered for the whole process, where copies of this file may meet: another calling convention takes another name.
ATTENTION_NAME = "bard_vl"


TILE = 256  # queries of one row that are attended together, where slots of a prompt follow each other


@dataclass
class Slots:
    """Blocks of queries, each of which sees the first `length` keys of its row; all are (slots,) in int32.

    Attributes:
        row: of the cache.
        begin, count: first query in the order of the tokens, and queries.
        length: keys that are seen.
        width: queries of the widest slot.
        host: rows, counts and lengths as lists, where the host knows them.
    """

    row: torch.Tensor
    begin: torch.Tensor
    count: torch.Tensor
    length: torch.Tensor
    width: int
    host: tuple[list[int], list[int], list[int]] | None = None

    @classmethod
    def of(cls, rows: list[int], counts: list[int], lengths: list[int], device: torch.device) -> "Slots":
        """Slots that the host knows, one behind the other."""
        begins = [0]
        for count in counts[:-1]:
            begins.append(begins[-1] + count)
        table = torch.tensor([rows, begins, counts, lengths], dtype=torch.int32).to(device)
        row, begin, count, length = table
        return cls(row, begin, count, length, max(counts), (rows, counts, lengths))

    def tiles(self) -> Iterator[tuple[int, int, int, list[tuple[int, int]]]]:
        """Runs of a row's slots, up to `TILE` queries: (row, first query, queries, [(queries, keys) of each slot])."""
        host = self.host or (self.row.tolist(), self.count.tolist(), self.length.tolist())
        parts: list[tuple[int, int]] = []
        open_row, begin, total = -1, 0, 0
        for row, count, length in zip(*host, strict=True):
            if parts and (row != open_row or total + count > TILE or length != parts[-1][1] + count):
                yield open_row, begin, total, parts
                begin, total, parts = begin + total, 0, []
            open_row, total = row, total + count
            parts.append((count, length))
        yield open_row, begin, total, parts


def block_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    slots: Slots | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in transformers' calling convention.

    Args:
        module: the attention layer, unused.
        query: (batch, heads, queries, head size).
        key, value: (batch, key/value heads, keys, head size).
        attention_mask: (batch, 1, queries, keys) boolean, or floating to be added, or a `BlockMask` for
            FlexAttention; None with `slots`.
        scaling: of the products, 1 / sqrt(head size) by default.
        dropout: of the weights, in training.
        slots: who sees whom, of queries (1, heads, tokens, head size) and keys and values of a whole cache (rows, ...).

    Returns:
        (batch, queries, heads, head size), and None for the weights.

    Raises:
        ValueError: text without a mask, who sees whom is then unknown; dropout under a `BlockMask`.
    """
    if slots is not None:
        return attend_slots(query[0].transpose(0, 1), key, value, slots, scaling, dropout)[None], None
    if attention_mask is None and getattr(module, "is_causal", False):
        raise ValueError(f"the attention {ATTENTION_NAME!r} of text layers needs a 4-D mask: call the whole model")
    if isinstance(attention_mask, BlockMask):
        output = attend_sparsely(query, key, value, attention_mask, scaling, dropout)
    else:
        output = attend(query, key, value, attention_mask, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


def attend_slots(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: Slots,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every slot's queries over the first `length` keys of its row.

    Args:
        query: (tokens, heads, head size), slot after slot.
        key, value: (rows, key heads, columns, head size).
        slots: see `Slots`.
        scaling, dropout: as in `block_attention`.

    Returns:
        (tokens, heads, head size).
    """
    query = query.to(value.dtype)  # under autocast the norms leave queries in float32
    if query.is_cuda and kernel_bard_vl.triton is not None:
        return kernel_bard_vl.attend_slots(query, key, value, slots, scaling)
    found = []
    for row, begin, total, parts in slots.tiles():
        queries = query[begin : begin + total].transpose(0, 1)[None]
        keys, values = (states[row : row + 1, :, : parts[-1][1]] for states in (key, value))
        mask = None
        if len(parts) > 1:  # the slots of a prompt: each sees those before it
            counts, lengths = torch.tensor(parts, device=query.device).T
            seen = lengths.repeat_interleave(counts, output_size=total)
            mask = (torch.arange(parts[-1][1], device=query.device) < seen[:, None])[None, None]
        found.append(attend(queries, keys, values, mask, scaling, dropout)[0])
    return torch.cat(found, dim=1).transpose(0, 1)


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
