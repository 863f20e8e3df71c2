"""Compiled decoding steps and the buffers that they run on: one graph per shape, the latest ones kept.

A step takes fixed shapes (rows, window width, columns of the cache), so that nothing is compiled again between steps,
blocks, and calls of the same shape. Its keys and values lie in buffers that a call borrows from a pool: a CUDA graph
finds them where it was recorded. Whatever cannot be compiled runs eagerly, after one warning.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import logging

from .attention_bard_vl import with_own_code
from .cache_bard_vl import Buffers
from .compat_bard_vl import encode_text
from .masking_bard_vl import to_attention_mask
from .remasking_bard_vl import Chooser
from .windows_bard_vl import TokenTable, take

logger = logging.get_logger(__name__)

Step = Callable[..., Any]
NUM_STEPS = 32  # kept for a model; the one that has not been asked for longest goes first
NUM_IDLE_BUFFERS = 4  # sets that wait for another call; the one that has waited longest goes first
NUM_WARM_UP_RUNS = 3  # of a step: a CUDA graph's kernels run, are recorded, and are replayed for the first time


@dataclass
class Compiled:
    """What is kept for a model: steps by shape and choice, latest use last, and buffers that no call is using."""

    steps: dict[tuple, Step] = field(default_factory=dict)
    idle: list[tuple[tuple, list[Buffers]]] = field(default_factory=list)


_compiled: weakref.WeakKeyDictionary[torch.nn.Module, Compiled] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_warming_up = threading.Lock()


def block_choice(
    text_model: Any,
    lm_head: torch.nn.Module,
    cache: Any,
    table: TokenTable,
    columns: torch.Tensor,
    offset: torch.Tensor,
    block_size: int,
    attention: str,
    chooser: Chooser | None,
) -> Any:
    """Encode a window of every row of the table, and choose the tokens of the block in each.

    Args:
        text_model, lm_head: the model's parts.
        cache: a cache that writes to the windows' columns, and reads all.
        table: tokens, positions and blocks.
        columns: (rows, width) of the windows.
        offset: (rows,) tokens of the window before its block.
        block_size: tokens of a block.
        attention: the text layers' attention implementation.
        chooser: what chooses, None to leave it to the caller.

    Returns:
        a `Choice`; without a chooser the logits (rows, block size, vocabulary).
    """
    ids, blocks = table.ids.gather(1, columns), table.blocks.gather(1, columns)
    embeds = text_model.embed_tokens(ids)
    mask = to_attention_mask(table.blocks[:, None] <= blocks[:, :, None], attention, embeds.dtype)
    positions = table.positions.gather(2, columns.expand(len(table.positions), -1, -1))
    hidden = encode_text(text_model, embeds, mask, positions, cache, use_cache=True)[0]
    logits = lm_head(take(hidden, offset, block_size)).to(ids.device)
    places = offset[:, None] + torch.arange(block_size, device=ids.device)
    return logits if chooser is None else chooser.choose(logits, ids.gather(1, places))


def compiled_step(model: Any, shape: tuple) -> Step:
    """`block_choice` of a model for one shape; compiled at its first call, the same function while it is kept.

    Args:
        model: of which weights and step live equally long.
        shape: whatever the step is specialised on.
    """
    # Graphs belong to a thread, and before torch 2.15 only the main one can record any: others compile without.
    on_cuda = next(model.parameters()).device.type == "cuda"
    shape = (*shape, on_cuda and threading.current_thread() is threading.main_thread())
    with _lock:
        steps = _compiled.setdefault(model, Compiled()).steps
        step = steps.pop(shape, None) or _step_of(model, records_graphs=shape[-1])
        steps[shape] = step
        if len(steps) > NUM_STEPS:
            del steps[next(iter(steps))]
        return step


@contextmanager
def lent_buffers(model: Any, shape: tuple) -> Iterator[list[Buffers]]:
    """Keys and values of a shape, a pair a layer, that no other call has meanwhile; empty where there are none yet.

    A later call gets the same ones, at the same address.
    """
    with _lock:
        idle = _compiled.setdefault(model, Compiled()).idle
        places = [place for place, (other, _) in enumerate(idle) if other == shape]
        buffers = idle.pop(places[-1])[1] if places else []
    try:
        yield buffers
    finally:
        with _lock:
            if buffers:  # a call that was refused has made none
                idle.append((shape, buffers))
            del idle[:-NUM_IDLE_BUFFERS]


def release_idle_buffers(model: Any) -> None:
    """Give back the memory of a model's buffers that no call is using."""
    with _lock:
        if model in _compiled:
            _compiled[model].idle.clear()


def _step_of(model: torch.nn.Module, records_graphs: bool) -> Step:
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        logger.warning_once(
            f"the model is spread over {', '.join(devices)} by `device_map`: its decoding step is not compiled and "
            "runs eagerly"
        )
        return block_choice
    return compile_with_fallback(block_choice, records_graphs)


def compile_with_fallback(function: Step, records_graphs: bool) -> Step:
    """The function compiled, as CUDA graphs if asked; itself, after a warning, where one of its first runs fails."""
    mode = "reduce-overhead" if records_graphs else None
    chosen: Step = torch.compile(with_own_code(function), fullgraph=True, dynamic=False, mode=mode)
    num_runs = 0

    def step(*args: Any) -> Any:
        nonlocal chosen, num_runs
        if num_runs >= NUM_WARM_UP_RUNS:
            return chosen(*args)
        try:
            with _warming_up:
                found = chosen(*args)
                num_runs += 1
                return found
        except torch.OutOfMemoryError:  # says nothing about the compiler
            raise
        except Exception as error:  # whatever the compiler throws; a fault of the step itself comes again below
            logger.warning_once(f"cannot compile the decoding step, it runs eagerly: {type(error).__name__}: {error}")
            chosen, num_runs = function, NUM_WARM_UP_RUNS
            return function(*args)

    return step


__all__ = [
    "NUM_WARM_UP_RUNS",
    "block_choice",
    "compile_with_fallback",
    "compiled_step",
    "lent_buffers",
    "release_idle_buffers",
]
