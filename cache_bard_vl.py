"""Key/value cache for block diffusion: blocks are written in place, and the cache knows what it encodes."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

Buffers = tuple[torch.Tensor, torch.Tensor]  # keys and values of one layer


@dataclass
class CacheWindow:
    """Where the next forward writes, and how far it reads. Rows are those of the batch that is still decoding.

    Attributes:
        rows, columns: where the new keys and values go: (rows, 1) and (rows, width) where the forward has a sequence a
            row; (1, tokens) both where it has all rows end to end in one.
        num_rows: rows that are read.
        start: the first column where all rows have the same columns, which follow each other; else None.
        end: columns [0, end) are read.
        capacity: columns that this generation can need at most.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    num_rows: int
    start: int | None
    end: int
    capacity: int


class BlockCacheLayer(DynamicLayer):
    """Keys and values (rows, heads, columns, head size) of one layer; without a window it appends like its parent."""

    window: CacheWindow | None = None
    is_initialized: bool
    is_lent = False  # keys and values are buffers that others will use after this generation

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states (rows, heads, width, head size) at the window's columns; return all up to its end."""
        if self.window is None:
            return super().update(key_states, value_states, *args, **kwargs)
        window = self.window
        key_states = key_states.to(value_states.dtype)  # under autocast the norms leave keys in float32
        self.reserve(window, key_states, value_states)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if window.start is not None:
                buffer[: window.num_rows, :, window.start : window.start + states.shape[2]] = states
            else:
                # Indexing and not `scatter_`: the compiler does that in place, too.
                rows, columns = window.rows.to(states.device), window.columns.to(states.device)
                buffer[rows, :, columns] = states.transpose(1, 2)
        return self.keys[: window.num_rows, :, : window.end], self.values[: window.num_rows, :, : window.end]

    def reserve(self, window: CacheWindow, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Grow if the window's end lies outside: by half, at most to the window's capacity."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            _, heads, _, size = key_states.shape
            self.keys, self.values = (key_states.new_empty(window.num_rows, heads, 0, size) for _ in range(2))
        have = self.keys.shape[2]
        if have < window.end:
            extra = min(max(window.end, have + have // 2), window.capacity) - have
            # Zeros, not empty memory: what is masked out still enters a product with a weight of zero.
            grow = [0, 0, 0, extra]
            self.keys = torch.nn.functional.pad(self.keys, grow)
            self.values = torch.nn.functional.pad(self.values, grow)

    def move_to(self, buffers: Buffers) -> None:
        """Go on in `buffers` (rows, heads, columns, head size) for keys and values."""
        self.is_lent = True
        for buffer, states in zip(buffers, (self.keys, self.values), strict=True):
            have = min(states.shape[2], buffer.shape[2])
            buffer[:, :, :have] = states[:, :, :have]
            buffer[:, :, have:] = 0
        self.keys, self.values = buffers

    def new_buffers(self, num_columns: int) -> Buffers:
        """Empty keys and values with so many columns, which CUDA graphs may expect to stay where they are."""
        rows, heads, _, size = self.keys.shape
        keys, values = (self.keys.new_empty(rows, heads, num_columns, size) for _ in range(2))
        for buffer in (keys, values):
            torch._dynamo.mark_static_address(buffer, guard=False)
        return keys, values

    def swap_rows(self, first: int, second: int) -> None:
        """Exchange two rows in place."""
        for states in (self.keys, self.values):
            kept = states[first].clone()  # and no list of indices, which a GPU would wait for
            states[first] = states[second]
            states[second] = kept


class BardVLCache(Cache):
    """What `generate` returns as `past_key_values` and takes back for the next turn.

    Attributes:
        scheme: what the keys and values were computed under, None while empty: block size first, then what else must
            be alike for them to be used, such as dtype and device.
        contents: per row, the (length,) CPU tensor of what the columns from 0 on encode: token ids, and for visual
            tokens a negative fingerprint of their image or video. Later columns hold nothing of use.
    """

    def __init__(self, num_layers: int):
        super().__init__(layers=[BlockCacheLayer() for _ in range(num_layers)])
        self.scheme: tuple | None = None
        self.contents: list[torch.Tensor] = []
        self._order: list[int] = []  # which row of the call each row is; empty while rows are being moved
        self._in_doubt = False  # from the start of a call until its clean-up is through

    @property
    def block_size(self) -> int | None:
        """Block size of the partition that the keys and values were computed under, None while empty."""
        return self.scheme[0] if self.scheme else None

    def shared_prefix(self, contents: list[torch.Tensor], scheme: tuple) -> int:
        """Columns, in whole blocks, that this cache already holds of every row of `contents`.

        Args:
            contents: per row, ids and fingerprints as in the attribute.
            scheme: as the attribute.

        Raises:
            ValueError: the cache holds another number of rows.
        """
        if not self.contents or self._in_doubt:
            return 0
        if len(self.contents) != len(contents):
            raise ValueError(f"`past_key_values` holds {len(self.contents)} rows, the prompt has {len(contents)}")
        if self.scheme != scheme:
            return 0
        block_size = scheme[0]
        shared = []
        for mine, theirs in zip(self.contents, contents, strict=True):
            length = min(len(mine), len(theirs))
            same = (mine[:length] == theirs[:length]).long().cumprod(0).sum().item()
            shared.append(int(same) // block_size * block_size)
        return min(shared)

    @contextmanager
    def generation(self, contents: list[torch.Tensor], scheme: tuple) -> Iterator[None]:
        """Keep the shared prefix and lend the columns behind it; whatever happens, what `contents` says stays true.

        After an exception the cache holds the prefix again, in the rows of `contents`. One that strikes while rows are
        moved, or during the clean-up, leaves a cache that the next call takes for empty.
        """
        kept = self.shared_prefix(contents, scheme)
        self._in_doubt = True
        if not kept:
            self._clear()
        self.scheme = scheme
        self.contents = prefix = [row[:kept] for row in contents]
        self._order = list(range(len(contents)))
        try:
            yield
        except BaseException:
            self.contents = prefix
            raise
        finally:
            self._settle()

    @contextmanager
    def writing(self, window: CacheWindow) -> Iterator[None]:
        """Direct the keys and values of one forward to a window."""
        self._set_window(window)
        try:
            yield
        finally:
            self._set_window(None)

    def retire(self, slot: int, last: int) -> None:
        """Move the row in `slot` behind the rows that are still decoding, of which `last` is the last."""
        if slot == last:
            return
        order, self._order = self._order, []
        for layer in self.layers:
            layer.swap_rows(slot, last)
        order[slot], order[last] = order[last], order[slot]
        self._order = order

    def repeat_rows(self, times: int) -> None:
        """Repeat every row `times` times, next to itself."""
        self._order = []
        self.batch_repeat_interleave(times)
        self.contents = [row for row in self.contents for _ in range(times)]
        self._order = list(range(len(self.contents)))

    def move_to(self, buffers: list[Buffers], num_columns: int) -> None:
        """Keep keys and values in lent `buffers`, one a layer, until the generation ends; missing ones are made."""
        for number, layer in enumerate(self.layers):
            if number == len(buffers):
                buffers.append(layer.new_buffers(num_columns))
            layer.move_to(buffers[number])

    def _set_window(self, window: CacheWindow | None) -> None:
        for layer in self.layers:
            layer.window = window

    def _settle(self) -> None:
        """Bring the rows in the order of `contents`, one for each, without the columns that encode nothing."""
        self._set_window(None)
        if not self._order:
            return
        length = max(len(row) for row in self.contents)
        if not length:
            self._clear()
        else:
            rows = torch.tensor(self._order).argsort()[:: len(self._order) // len(self.contents)]
            if rows.tolist() != list(range(len(self._order))):
                self.batch_select_indices(rows)
            for layer in self.layers:
                keys, values = layer.keys[:, :, :length], layer.values[:, :, :length]
                layer.keys, layer.values = (keys.clone(), values.clone()) if layer.is_lent else (keys, values)
                layer.is_lent = False
        self._in_doubt = False

    def _clear(self) -> None:
        for layer in self.layers:
            layer.is_initialized, layer.is_lent, layer.keys, layer.values = False, False, None, None


def fingerprint(*tensors: torch.Tensor) -> int:
    """A negative 62-bit number that stands for the tensors' shapes and values (SHA-256), never equal to a token id."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return -1 - int.from_bytes(digest.digest()[:8], "big") % 2**62


__all__ = ["BardVLCache", "BlockCacheLayer", "Buffers", "CacheWindow", "fingerprint"]
