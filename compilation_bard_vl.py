"""Compiled decoding steps: one graph a shape, kept as long as the model lives.

A step takes fixed shapes (rows, window width, columns of the cache), so that nothing is compiled again between steps,
blocks, and calls of the same shape. Whatever cannot be compiled runs eagerly, after one warning.
"""

import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from .masking_bard_vl import to_attention_mask

logger = logging.get_logger(__name__)

Step = Callable[..., torch.Tensor]
_steps: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, Step]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def block_logits(
    text_model: Any,
    lm_head: torch.nn.Module,
    cache: Any,
    ids: torch.Tensor,
    positions: torch.Tensor,
    query_blocks: torch.Tensor,
    key_blocks: torch.Tensor,
    offset: torch.Tensor,
    block_size: int,
    attention: str,
) -> torch.Tensor:
    """Encode windows and predict the tokens of the block in each.

    Args:
        text_model, lm_head: the model's parts.
        cache: a cache that writes to the windows' columns.
        ids: (rows, width); positions: (4, rows, width).
        query_blocks: (rows, width) and key_blocks: (rows, columns): a query sees keys of its own and earlier blocks.
        offset: (rows,) tokens of the window before its block.
        block_size: tokens of a block.
        attention: the text layers' attention implementation.

    Returns:
        logits (rows, block size, vocabulary).
    """
    embeds = text_model.embed_tokens(ids)
    visible = key_blocks[:, None, :] <= query_blocks[:, :, None]
    hidden = text_model(
        inputs_embeds=embeds,
        attention_mask=to_attention_mask(visible, attention, embeds.dtype),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )[0]
    columns = offset[:, None] + torch.arange(block_size, device=offset.device)
    return lm_head(hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1])))


def compiled_step(model: torch.nn.Module, shape: tuple) -> Step:
    """The step of a model for one shape; compiled at its first call, the same function ever after."""
    with _lock:
        steps = _steps.setdefault(model, {})
        if shape not in steps:
            steps[shape] = _compile_with_fallback(next(model.parameters()).device.type)
        return steps[shape]


def _compile_with_fallback(device: str) -> Step:
    # A code object of its own: dynamo counts compilations by code object, and stops at eight.
    code = block_logits.__code__.replace(co_name="compiled_block_logits")
    own = types.FunctionType(code, block_logits.__globals__)
    mode = "reduce-overhead" if device == "cuda" else None
    state: dict[str, Step] = {"step": torch.compile(own, fullgraph=True, dynamic=False, mode=mode)}
    tried = threading.Event()

    def step(*args: Any) -> torch.Tensor:
        if tried.is_set():
            return state["step"](*args)
        try:
            with _lock:
                return state["step"](*args)
        except Exception as error:  # whatever the compiler throws; a fault of the step itself comes again below
            logger.warning_once(f"cannot compile the decoding step, it runs eagerly: {type(error).__name__}: {error}")
            state["step"] = block_logits
            return block_logits(*args)
        finally:
            tried.set()

    return step


__all__ = ["block_logits", "compiled_step"]
