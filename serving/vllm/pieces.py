"""The pieces into which the attention of a step is cut: pure numbers.

A request's tokens see their whole block and all before it. vLLM's kernels know requests that see all their keys: every
block of a request is handed to them as a request of its own, whose keys end with the block.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Pieces:
    """Blocks of a step's requests, in the order of their queries.

    Attributes:
        rows: (pieces,) the request of each.
        bounds: (pieces + 1,) first query of each, and the number of queries.
        ends: (pieces,) keys that each sees, which are those of its request up to its end.
    """

    rows: np.ndarray
    bounds: np.ndarray
    ends: np.ndarray


def cut(computed: np.ndarray, scheduled: np.ndarray, prompt_lengths: np.ndarray, block_size: int) -> Pieces:
    """Cut the queries of requests at block borders: from 0 on in the prompt, from the prompt's end on behind it.

    Args:
        computed, scheduled, prompt_lengths: (requests,) tokens before the step, of the step, and of the prompt.
        block_size: tokens per block.
    """
    rows: list[int] = []
    counts: list[int] = []
    ends: list[int] = []
    for row, (start, count, length) in enumerate(zip(computed, scheduled, prompt_lengths, strict=True)):
        position, stop = int(start), int(start + count)
        while position < stop:
            origin, last = (0, int(length)) if position < length else (int(length), stop)
            border = origin + ((position - origin) // block_size + 1) * block_size
            end = min(border, last, stop)
            rows.append(row)
            counts.append(end - position)
            ends.append(end)
            position = end
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Pieces(np.array(rows, dtype=np.int64), bounds, np.array(ends, dtype=np.int32))


def whole_blocks(start: int, count: int, prompt_length: int, block_size: int) -> int:
    """Tokens of `count` from position `start` on that end where a block ends: no block may be cut by a step."""
    end = start + count
    if end < prompt_length:
        end = end // block_size * block_size
    else:
        end = prompt_length + (end - prompt_length) // block_size * block_size
    return max(end - start, 0)
