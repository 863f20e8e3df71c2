"""Key/value cache for block diffusion: blocks are written in place, and the cache knows what it encodes."""

import copy
import hashlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

Buffers = tuple[torch.Tensor, torch.Tensor]  # keys and values of one layer


@dataclass
class Writing:
    """The places of one forward's new keys and values, and the columns that its attention reads.

    Attributes:
        rows, columns: (tokens,) place of each new key and value, in the order of the tokens.
        num_rows: rows of the cache.
        end: columns that there must be.
        capacity: columns that this generation can need at most.
        read: rows that stock attention reads, up to `end`, (batch,) or a slice; None where whole buffers are read.
        is_kept: False if the forward reads all up to `end`, then its own tokens, and leaves nothing behind.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    num_rows: int
    end: int
    capacity: int
    read: torch.Tensor | slice | None = None
    is_kept: bool = True


class BlockCacheLayer(DynamicLayer):
    """Keys and values (rows, heads, columns, head size) of one layer; outside of a generation as its parent."""

    writing: Writing | None = None
    is_initialized: bool
    is_lent = False  # keys and values are buffers that others will use after this generation

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states (batch, heads, width, head size); return what the attention is to read."""
        writing = self.writing
        if writing is None:
            return super().update(key_states, value_states, *args, **kwargs)
        key_states = key_states.to(value_states.dtype)  # under autocast the norms leave keys in float32
        new = (key_states, value_states)
        if not writing.is_kept:
            own = (self.keys, self.values)
            keys, values = (torch.cat([o[:, :, : writing.end], n], 2) for o, n in zip(own, new, strict=True))
            return keys, values
        self.reserve(writing, *new)
        rows, columns = writing.rows.to(self.keys.device), writing.columns.to(self.keys.device)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[rows, :, columns] = states.transpose(1, 2).flatten(0, 1)
        if writing.read is None:
            return self.keys, self.values
        read = writing.read if isinstance(writing.read, slice) else writing.read.to(self.keys.device)
        return self.keys[read, :, : writing.end], self.values[read, :, : writing.end]

    def reserve(self, writing: Writing, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Grow if columns are missing: by half, at most to the capacity."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            _, heads, _, size = key_states.shape
            self.keys, self.values = (key_states.new_empty(writing.num_rows, heads, 0, size) for _ in range(2))
        have = self.keys.shape[2]
        if have < writing.end:
            extra = min(max(writing.end, have + have // 2), writing.capacity) - have
            # Zeros, not empty memory: what a mask hides still enters a product with a weight of zero.
            grow = [0, 0, 0, extra]
            self.keys = torch.nn.functional.pad(self.keys, grow)
            self.values = torch.nn.functional.pad(self.values, grow)

    def lend(self, buffers: Buffers) -> None:
        """Go on in `buffers` (rows, heads, columns, head size) for keys and values."""
        for buffer, states in zip(buffers, (self.keys, self.values), strict=True):
            if self.is_initialized:
                have = min(states.shape[2], buffer.shape[2])
                buffer[: len(states), :, :have] = states[:, :, :have]
        self.keys, self.values = buffers
        self.dtype, self.device, self.is_initialized, self.is_lent = self.keys.dtype, self.keys.device, True, True


class BardVLCache(Cache):
    """The `past_key_values` that `generate` returns and takes back for the next turn.

    Attributes:
        scheme: what the keys and values were computed under, None while empty: block size first, then what else must
            be alike for them to be used, such as dtype and device.
        contents: per row, the (length,) CPU tensor of what the columns from 0 on encode: token ids, and for visual
            tokens a negative fingerprint of their image or video. Later columns hold nothing of use. Empty as soon as
            keys or values are other tensors than `generate` left, or were written to: by `crop`, by a forward that
            appended to them, by anybody. Reordered, selected and repeated rows keep theirs.
    """

    def __init__(self, num_layers: int):
        super().__init__(layers=[BlockCacheLayer() for _ in range(num_layers)])
        self.scheme: tuple | None = None
        self._contents: list[torch.Tensor] = []
        self._witness: list[tuple] = []  # the keys and values that `contents` speaks of
        self._in_doubt = False  # from the start of a call until its clean-up is through

    @property
    def contents(self) -> list[torch.Tensor]:
        """See the class."""
        is_true = len(self._witness) == len(self.layers) and all(map(is_untouched, self._witness, self.layers))
        return self._contents if is_true else []

    @contents.setter
    def contents(self, contents: list[torch.Tensor]) -> None:
        self._contents = contents
        self._witness = [witness(layer) for layer in self.layers]

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
        """Context of one generation: columns after the shared prefix may be overwritten, rows repeated.

        On exit `contents` again describes the cache: after an exception, the shared prefix. If it interrupts the
        clean-up, the next call treats the cache as empty.
        """
        kept = self.shared_prefix(contents, scheme)
        self._in_doubt = True
        if not kept:
            self._clear()
        self.scheme = scheme
        self.contents = prefix = [row[:kept] for row in contents]
        try:
            yield
        except BaseException:
            self.contents = prefix
            raise
        finally:
            self._settle()

    @contextmanager
    def writing(self, writing: Writing) -> Iterator[None]:
        """Direct the keys and values of one forward."""
        self._direct(writing)
        try:
            yield
        finally:
            self._direct(None)

    def reset(self) -> None:
        """Empty the cache."""
        self._clear()
        self.contents = []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put other rows in the place of each, by (rows,) indices."""
        contents = self._selected(beam_idx)
        super().reorder_cache(beam_idx)
        self.contents = contents

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some rows, by indices or (rows,) bool."""
        contents = self._selected(indices)
        super().batch_select_indices(indices)
        self.contents = contents

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, next to itself."""
        contents = [row for row in self.contents for _ in range(repeats)]
        super().batch_repeat_interleave(repeats)
        self.contents = contents

    def _selected(self, indices: Any) -> list[torch.Tensor]:
        contents = self.contents
        if not contents:  # nothing is claimed of any row
            return []
        return [contents[row] for row in torch.arange(len(contents))[torch.as_tensor(indices).cpu()].tolist()]

    def __deepcopy__(self, memo: dict) -> "BardVLCache":
        """A copy that claims the same of its own keys and values."""
        copied = type(self)(len(self.layers))
        copied.layers, copied.scheme = copy.deepcopy(self.layers, memo), self.scheme
        copied.contents = list(self.contents)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """A pickled cache claims nothing: no other process can tell whose weights computed it."""
        return {**vars(self), "_contents": [], "_witness": [], "scheme": None}

    def repeat_rows(self, times: int) -> None:
        """Repeat every row `times` times, next to itself."""
        for layer in self.layers:
            layer.batch_repeat_interleave(times)
        self._contents = [row for row in self._contents for _ in range(times)]

    def lend(self, buffers: list[Buffers]) -> None:
        """Keep keys and values in `buffers`, a pair a layer, until the generation ends."""
        for layer, pair in zip(self.layers, buffers, strict=True):
            layer.lend(pair)

    def _direct(self, writing: Writing | None) -> None:
        for layer in self.layers:
            layer.writing = writing

    def _settle(self) -> None:
        """Bring one row for each of `contents`, without the columns that encode nothing."""
        self._direct(None)
        length = max(len(row) for row in self._contents)
        if not length:
            self._clear()
        for layer in self.layers if length else ():
            step = len(layer.keys) // len(self._contents)  # above 1 where rows were repeated for what then failed
            keys, values = (states[::step, :, :length][: len(self._contents)] for states in (layer.keys, layer.values))
            if layer.is_lent or step > 1:
                keys, values = keys.clone(), values.clone()
            layer.keys, layer.values, layer.is_lent = keys, values, False
        self.contents = self._contents
        self._in_doubt = False

    def _clear(self) -> None:
        self.layers: list[Any] = [BlockCacheLayer() for _ in range(len(self.layers))]


def version(tensor: torch.Tensor) -> int | None:
    """The number of writes to a tensor in place; None for one of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_of_bits(tensor: torch.Tensor) -> int:
    """A sum over all elements' bits, which tells a tensor from itself after a write where nothing counts writes."""
    return int(tensor.detach().view(BITS[tensor.element_size()]).sum(dtype=torch.int64))


def witness(layer: Any) -> tuple:
    """A fingerprint of a layer's keys and values, which changes when something writes to them."""
    found: list[Any] = []
    for tensor in (getattr(layer, name, None) for name in ("keys", "values")):
        written = None if tensor is None else sum_of_bits(tensor) if tensor.is_inference() else version(tensor)
        found.append(None if tensor is None else (weakref.ref(tensor), written))
    return tuple(found)


def is_untouched(seen: tuple, layer: Any) -> bool:
    """Whether a layer's keys and values are those of a `witness`."""
    return all(
        then is now is None or (then and now and then[0]() is now[0]() and then[1] == now[1])
        for then, now in zip(seen, witness(layer), strict=True)
    )


ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")  # of PEFT's layers


class WeightsPrint:
    """Tells the weights that keys and values were computed by from any others, at the cost of a look at each tensor.

    Two are equal if they speak of the same tensors, as often written to in place, with the same numbers at about 64
    places of each (a tensor does not count what is written to its `.data`), under the same state of adapters. A few
    numbers changed through `.data` may go unnoticed; an optimizer's step, a merged adapter or other weights do not.
    """

    def __init__(self, model: Any):
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._facts = ([version(tensor) for tensor in tensors], sampled_bits(tensors), adapter_state(model))

    def __eq__(self, other: object) -> bool:
        """Whether both speak of the same weights in the same state."""
        if not isinstance(other, WeightsPrint) or len(self._tensors) != len(other._tensors):
            return False
        alike = (mine() is theirs() is not None for mine, theirs in zip(self._tensors, other._tensors, strict=True))
        return self._facts == other._facts and all(alike)

    __hash__ = None  # type: ignore[assignment]


def sampled_bits(tensors: list[torch.Tensor], places: int = 64) -> str:
    """SHA-256 of numbers at evenly spread places of each plain tensor that has memory."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        if is_plain and tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().flatten()
            by_device.setdefault(tensor.device, []).append(flat[:: max(len(flat) // places, 1)].float())
    digest = hashlib.sha256()
    for parts in by_device.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def adapter_state(model: torch.nn.Module) -> list[str]:
    """Of each layer that adapters changed: which are active, merged, switched off, and which serve which row."""
    found = []
    for module in model.modules():
        if hasattr(type(module), ADAPTER_STATE[0]) or ADAPTER_STATE[0] in vars(module):
            rows = [getattr(hook, "keywords", None) for hook in module._forward_pre_hooks.values()]
            found.append(repr([*(getattr(module, name, None) for name in ADAPTER_STATE), rows]))
    return found


def fingerprint(*tensors: torch.Tensor) -> int:
    """A negative 62-bit number that stands for the tensors' shapes and values (SHA-256), never equal to a token id."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return -1 - int.from_bytes(digest.digest()[:8], "big") % 2**62
