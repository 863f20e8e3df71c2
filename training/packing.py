"""Packed rows: several conversations in one row, every assistant turn trained, as inference would see it.

A sample x with responses [s_k, e_k) is laid out in a row as (arXiv 2604.16514, figure 3b, extended to several turns)

    base x[0 : a_last) | for each turn k: tail x[a_k : s_k), clean response, noisy response

where a_k = floor(s_k / B) * B and all copies of a response are padded to a multiple of B; there may be a second noisy
copy, blind to the first. Inference cuts the prompt of a turn into blocks from 0 up to s_k, so what follows a_k is
in another block for every turn and is copied; what precedes it is shared. With one turn this is
[prompt | clean | noisy]. `visible` says who sees whom; it serves dense masks and FlexAttention alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask

from ..inputs_bard_vl import MEDIA_KINDS, VISUAL_INPUTS

BASE, CLEAN, NOISY = 0, 1, 2
TILE = 128  # queries, and keys, that FlexAttention's kernel takes together
EVERYTHING = 2**31 - 1  # an anchor behind every place
NEVER = 2**31 - 1  # in the order of an answer: a place that no step decided


@dataclass
class Sample:
    """One tokenised conversation, on the CPU.

    Attributes:
        input_ids: (length,) token ids, a placeholder for every visual feature.
        position_ids: (3, length) temporal, height and width positions.
        responses: [start, end) of every assistant turn, ascending; the end is behind its end-of-sequence token.
        visual_index: (length,) row of the sample's own visual features that a token shows, images before videos, -1
            for none.
        visual_inputs: pixels and grids as the processor makes them, absent where there are none.
        sample_id: seeds the sample's noise.
        merge_size: patches along a side of a visual feature.
        orders: of responses that a model wrote, the order of commitment: for every response (whole blocks,) the step of
            its block that decided each token, from 0, or `NEVER`. Empty for responses without one.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    responses: list[tuple[int, int]]
    visual_index: torch.Tensor
    visual_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    sample_id: int = 0
    merge_size: int = 2
    orders: list[torch.Tensor] = field(default_factory=list)

    def features_per_item(self) -> list[torch.Tensor]:
        """Visual features of each image, then of each video: two (items,) tensors."""
        none = torch.zeros(0, 3, dtype=torch.long)
        return [self.visual_inputs.get(kind.grids, none).prod(-1) // self.merge_size**2 for kind in MEDIA_KINDS]


class Layout(NamedTuple):
    """The numbers that decide which tokens see which; every member has the same shape.

    Attributes:
        sample: number of the sample; every padding token is a sample of its own.
        turn: 0 for the base, k for the copies of turn k.
        noisy: whether the token belongs to a noisy copy.
        place: position in the sample.
        anchor: base tokens at places before it can be seen.
        rank: number of the token's block when inference comes to its turn.
        view: 1 for the second noisy copy, else 0.
    """

    sample: torch.Tensor
    turn: torch.Tensor
    noisy: torch.Tensor
    place: torch.Tensor
    anchor: torch.Tensor
    rank: torch.Tensor
    view: torch.Tensor


def visible(query: Layout, key: Layout) -> torch.Tensor:
    """Whether queries see keys; the members of both broadcast against each other.

    Base keys before the query's anchor and not in a later block; of the query's own turn, clean keys of earlier blocks
    (and of its own, if it is clean itself), and for noisy queries the noisy keys of their own block and copy.
    """
    base = (key.turn == 0) & (key.place < query.anchor) & (key.rank <= query.rank)
    earlier = ~key.noisy & (key.rank < query.rank)
    own_block = (key.noisy == query.noisy) & (key.view == query.view) & (key.rank == query.rank)
    return (key.sample == query.sample) & (base | ((key.turn == query.turn) & (earlier | own_block)))


def dense_mask(layout: Layout) -> torch.Tensor:
    """Mask (rows, length, length) bool of a layout whose members are (rows, length)."""
    rows, length = layout.rank.shape
    mask = torch.empty(rows, length, length, dtype=torch.bool, device=layout.rank.device)
    for first in range(0, length, TILE):
        queries = slice(first, first + TILE)
        mask[:, queries] = _visible_to(layout, queries)
    return mask


def _visible_to(layout: Layout, queries: slice) -> torch.Tensor:
    """What some queries see, (rows, queries, length): of all at once each pair would take some ten bytes."""
    return visible(Layout(*(x[:, queries, None] for x in layout)), Layout(*(x[:, None, :] for x in layout)))


def fair(student: Layout, teacher: Layout, shown: torch.Tensor, sees_own: bool = True) -> torch.Tensor:
    """Whether a teacher of smaller blocks sees all that the student sees, for noisy tokens (rows, length) bool.

    Under both masks of one packed row the teacher sees, of the student's block, its own smaller block as it is, and
    those before it clean. Beyond that the student sees the shown tokens of later smaller blocks: a position without
    any is fair.

    Args:
        student, teacher: layouts of one packed row, members (rows, length).
        shown: bool, the noisy tokens that are not masked.
        sees_own: False for an autoregressive teacher, which predicts a token from those before it and so does not see
            what is shown in its place.
    """
    rows = torch.arange(len(shown), device=shown.device)[:, None].expand_as(shown)
    group = torch.stack([rows, student.sample, student.turn, student.view, student.rank])
    groups, number = group.flatten(1).unique(dim=1, return_inverse=True)
    last = torch.full((groups.shape[1],), -1, device=shown.device)
    rank = torch.where(shown & teacher.noisy, teacher.rank, -1).flatten()
    last = last.scatter_reduce(0, number, rank, "amax")[number].view_as(shown)
    return student.noisy & (last <= teacher.rank if sees_own else last < teacher.rank)


def flex_mask(layout: Layout, tile: int = TILE) -> BlockMask:
    """The same mask for FlexAttention, in tiles of `tile` x `tile`; seen on CUDA only in training."""
    length = layout.rank.shape[1]
    members = [x if x.dtype == torch.bool else x.int() for x in layout]

    def mask_mod(
        row: torch.Tensor, head: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
    ) -> torch.Tensor:
        query, key = (Layout(*(member[row, i] for member in members)) for i in (query_index, key_index))
        return visible(query, key)

    some = [_tiles(layout, slice(first, first + tile), tile) for first in range(0, length, tile)]
    seen, full = (torch.stack(each, dim=1) for each in zip(*some, strict=True))
    mask = BlockMask.from_kv_blocks(*_listed(seen & ~full), *_listed(full), BLOCK_SIZE=tile, mask_mod=mask_mod)
    mask.seq_lengths = (length, length)  # of whole tiles until here
    return mask


def _tiles(layout: Layout, queries: slice, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a tile of queries sees some keys, and all, of each tile of keys: both (rows, tiles)."""
    pairs = _visible_to(layout, queries)
    _, height, width = pairs.shape
    tiles = torch.nn.functional.pad(pairs, [0, -width % tile, 0, tile - height]).unflatten(2, (-1, tile))
    return tiles.any(3).any(1), tiles.all(3).all(1)


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of keys of each tile of queries, number and indices: (rows, 1, tiles) and (rows, 1, tiles, tiles)."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


@dataclass
class PackedRows:
    """Samples packed into rows; tensors are (rows, length) unless said otherwise.

    Attributes:
        block_size: tokens per block that the rows are laid out for.
        input_ids: clean tokens everywhere, in the noisy copies too.
        position_ids: (4, rows, length) column, then temporal, height and width positions of the source.
        visual_index: row of the batch's visual features (all images in the order of the samples, then all videos) that
            a token shows, -1 for none.
        visual_inputs: pixels and grids of all samples.
        sample: number of the sample in the batch, -1 for padding.
        turn: 0 for the base, k = 1, 2, ... for the copies of turn k.
        stream: `BASE`, `CLEAN` (tail and clean copy) or `NOISY`.
        view: 1 for the second noisy copy, else 0.
        place: position in the sample; what pads a response continues the count.
        origin: first place of the turn's response; 0 for the base.
        anchor: base tokens at places before it are seen.
        is_response_padding: whether the token only fills up a response's last block.
        twin: column of a noisy token's clean twin, -1 for other tokens.
        previous: column of the clean token right before a noisy token's place, where an autoregressive model predicts
            it; -1 for other tokens.
        order: step that decided a noisy token when a model wrote the answer, `NEVER` if none did, -1 where no order is
            known.
        sample_ids: (samples,) `sample_id` of each sample.
    """

    block_size: int
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    visual_index: torch.Tensor
    visual_inputs: dict[str, torch.Tensor]
    sample: torch.Tensor
    turn: torch.Tensor
    stream: torch.Tensor
    view: torch.Tensor
    place: torch.Tensor
    origin: torch.Tensor
    anchor: torch.Tensor
    is_response_padding: torch.Tensor
    twin: torch.Tensor
    previous: torch.Tensor
    order: torch.Tensor
    sample_ids: torch.Tensor

    @property
    def noisy(self) -> torch.Tensor:
        """Whether a token belongs to a noisy copy, response padding included: (rows, length) bool."""
        return self.stream == NOISY

    @property
    def answer(self) -> torch.Tensor:
        """Number of a token's sample and noisy copy, -1 for padding: each copy is an answer of its own to a loss."""
        return torch.where(self.sample < 0, -1, self.sample * (int(self.view.max()) + 1) + self.view)

    def layout(self, block_size: int | None = None) -> Layout:
        """The visibility at a block size: the rows' own by default, or another that divides it (a teacher's).

        Raises:
            ValueError: `block_size` does not divide the rows' own: its prompt blocks would cross the tails' edges.
        """
        block_size = self.block_size if block_size is None else block_size
        if block_size < 1 or self.block_size % block_size:
            raise ValueError(
                f"rows packed in blocks of {self.block_size} can be read under block sizes that divide it, "
                f"not {block_size}"
            )
        in_response = (self.turn > 0) & (self.place >= self.origin)
        first = (self.origin + block_size - 1) // block_size
        rank = torch.where(in_response, first + (self.place - self.origin) // block_size, self.place // block_size)
        columns = torch.arange(rank.shape[1], device=rank.device)
        sample = torch.where(self.sample < 0, -1 - columns, self.sample)
        return Layout(sample, self.turn, self.noisy, self.place, self.anchor, rank, self.view)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedRows":
        """The rows on another device."""
        moved: dict[str, Any] = {
            "visual_inputs": {name: x.to(device, non_blocking=non_blocking) for name, x in self.visual_inputs.items()}
        }
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, torch.Tensor):
                moved[each.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)


def packed_length(responses: Sequence[tuple[int, int]], length: int, block_size: int, noisy_copies: int = 1) -> int:
    """Columns that a sample of `length` tokens takes in a row.

    Raises:
        ValueError: the responses are no ascending, disjoint ranges inside the sample behind a prompt.
    """
    check_responses(responses, length)
    anchors = [start // block_size * block_size for start, _ in responses]
    copies = (
        start - anchor + (1 + noisy_copies) * whole_blocks(end - start, block_size)
        for (start, end), anchor in zip(responses, anchors, strict=True)
    )
    return anchors[-1] + sum(copies)


def whole_blocks(length: int, block_size: int) -> int:
    """`length` rounded up to a multiple of `block_size`."""
    return -(-length // block_size) * block_size


def check_responses(responses: Sequence[tuple[int, int]], length: int) -> None:
    """Raise `ValueError` unless there are responses, ascending and disjoint in [1, length), none of them empty."""
    if not responses:
        raise ValueError("the sample has no assistant turn to train on")
    free_from = 1
    for start, end in responses:
        if end <= start:
            raise ValueError(f"the response [{start}, {end}) is empty")
        if start < 1 or end > length:
            raise ValueError(f"the response [{start}, {end}) lies outside a prompt's end and the {length} tokens")
        if start < free_from:
            raise ValueError(f"the response [{start}, {end}) begins before the one before it has ended, at {free_from}")
        free_from = end


def check_sample(sample: Sample) -> None:
    """Raise `ValueError` unless a sample's shapes, responses and visual features agree; the message names the value."""
    length = len(sample.input_ids)
    if len(sample.orders) not in (0, len(sample.responses)):
        raise ValueError(f"the sample has {len(sample.orders)} orders for {len(sample.responses)} responses")
    shapes = {"position_ids": (3, length), "visual_index": (length,)}
    for name, shape in shapes.items():
        if tuple(getattr(sample, name).shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(getattr(sample, name).shape)}")
    check_responses(sample.responses, length)
    for kind in MEDIA_KINDS:
        patches = int(sample.visual_inputs[kind.grids].prod(-1).sum()) if kind.grids in sample.visual_inputs else 0
        given = len(sample.visual_inputs[kind.pixels]) if kind.pixels in sample.visual_inputs else 0
        if patches != given:
            raise ValueError(f"`{kind.grids}` speaks of {patches} patches, `{kind.pixels}` holds {given}")
    features = int(torch.cat(sample.features_per_item()).sum())
    lowest, highest = int(sample.visual_index.min()), int(sample.visual_index.max())
    if lowest < -1 or highest >= features:
        wrong = lowest if lowest < -1 else highest
        raise ValueError(f"`visual_index` holds {wrong}, the sample has {features} visual features")
    for start, end in sample.responses:
        if (sample.visual_index[start:end] >= 0).any():
            raise ValueError(f"the response [{start}, {end}) holds visual tokens, which nothing can generate")


def check_orders(sample: Sample, block_size: int) -> None:
    """Raise `ValueError` unless the orders of a sample are those of its responses, filled up to whole blocks."""
    for order, (start, end) in zip(sample.orders, sample.responses, strict=False):
        width = whole_blocks(end - start, block_size)
        if tuple(order.shape) != (width,) or (order < 0).any():
            raise ValueError(
                f"the order of the response [{start}, {end}) must be {width} steps of at least 0, "
                f"got {order.tolist()[:8]} of shape {tuple(order.shape)}"
            )


def truncate(sample: Sample, block_size: int, max_length: int, noisy_copies: int = 1) -> Sample | None:
    """Shorten a sample until it takes `max_length` columns at most.

    The last response is cut to whole blocks, so that nothing pads it: a cut response has no end of sequence. Where not
    one block fits, the turn is dropped. Images and videos that no token shows any more go too.

    Returns:
        The sample, itself if it fits, or None if nothing is left.
    """
    length = len(sample.input_ids)
    responses = list(sample.responses)
    excess = packed_length(responses, length, block_size, noisy_copies) - max_length
    while excess > 0:
        start, end = responses.pop()
        num_blocks = -(-(end - start) // block_size) - -(-excess // ((1 + noisy_copies) * block_size))
        if num_blocks > 0:
            responses.append((start, start + num_blocks * block_size))
        if not responses:
            return None
        excess = packed_length(responses, length, block_size, noisy_copies) - max_length
    return sample if responses == sample.responses else _keep(sample, responses)


def until(sample: Sample, turn: int) -> Sample:
    """The sample up to the end of a turn (of 0, 1, ...), with what is seen by then."""
    return _keep(sample, sample.responses[: turn + 1])


def _keep(sample: Sample, responses: list[tuple[int, int]]) -> Sample:
    """The sample up to the end of the last of `responses`, without images and videos that no token shows."""
    end = responses[-1][1]
    sample = replace(
        sample,
        input_ids=sample.input_ids[:end],
        position_ids=sample.position_ids[:, :end],
        responses=responses,
        visual_index=sample.visual_index[:end],
    )
    index = sample.visual_index
    per_kind = sample.features_per_item()
    features = torch.cat(per_kind)
    item = torch.arange(len(features)).repeat_interleave(features)
    seen = torch.isin(torch.arange(len(features)), item[index[index >= 0]])
    if seen.all():
        return sample
    new_row = seen[item].long().cumsum(0) - 1
    visual_inputs = {}
    for kind, kept in zip(MEDIA_KINDS, seen.split([len(counts) for counts in per_kind]), strict=True):
        if kept.any():
            of_kept = kept.repeat_interleave(sample.visual_inputs[kind.grids].prod(-1))
            visual_inputs[kind.pixels] = sample.visual_inputs[kind.pixels][of_kept]
            visual_inputs[kind.grids] = sample.visual_inputs[kind.grids][kept]
    moved = index.clone()
    moved[index >= 0] = new_row[index[index >= 0]]
    return replace(sample, visual_index=moved, visual_inputs=visual_inputs)


def first_fit_decreasing(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Numbers of the items in each row: the longest first, each into the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        row = next((row for row, left in enumerate(room) if left >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


def deal(lengths: Sequence[int], max_length: int, processes: int, micro_batches: int) -> list[list[list[int]]]:
    """Samples of one optimizer step for every micro-batch and process, as rows of like length side by side.

    The samples are laid into as few rows as they need. Rounds of a row for each process take the fullest ones, and the
    last round the shortest rows that hold what is left: what processes do at the same time takes them as long. Where
    there are fewer rounds than micro-batches the first ones are empty; where there are more, several rows are in one.

    Args:
        lengths: columns that each sample takes.
        max_length: columns of a row.
        processes, micro_batches: of a step.

    Returns:
        For each micro-batch, for each process, the numbers of its samples.
    """
    left = list(range(len(lengths)))
    rounds: list[list[list[int]]] = []
    while left:
        rows = _rows_of(left, lengths, max_length)
        if len(rows) <= processes:
            rows = _shortest_rows(left, lengths, max_length, processes)
        rows = sorted(rows, key=lambda row: -sum(lengths[number] for number in row))[:processes]
        rounds.append(rows + [[]] * (processes - len(rows)))
        taken = set(chain.from_iterable(rows))
        left = [number for number in left if number not in taken]
    together = max(1, -(-len(rounds) // micro_batches))
    dealt = [
        [list(chain.from_iterable(share)) for share in zip(*rounds[first : first + together], strict=True)]
        for first in range(0, len(rounds), together)
    ]
    return [[[] for _ in range(processes)] for _ in range(micro_batches - len(dealt))] + dealt


def _rows_of(numbers: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    rows = first_fit_decreasing([lengths[number] for number in numbers], max_length)
    return [[numbers[place] for place in row] for row in rows]


def _shortest_rows(numbers: Sequence[int], lengths: Sequence[int], max_length: int, num_rows: int) -> list[list[int]]:
    """Rows for samples that fit in `num_rows` of `max_length`, as short as first fit finds (multifit)."""
    rows = _rows_of(numbers, lengths, max_length)
    low, high = max(lengths[number] for number in numbers), max_length
    while low < high:
        middle = (low + high) // 2
        shorter = _rows_of(numbers, lengths, middle)
        if len(shorter) > num_rows:
            low = middle + 1
        else:
            rows, high = shorter, middle
    return rows


def pack(
    samples: Sequence[Sample],
    block_size: int,
    max_length: int,
    pad_token_id: int,
    response_padding_id: int,
    pad_to_multiple_of: int = 1,
    noisy_copies: int = 1,
) -> PackedRows:
    """Pack samples into few rows of `max_length` columns at most, the longest samples first.

    What follows a sample's last response is left out.

    Args:
        samples: conversations; without any there is one row of padding.
        block_size: tokens per block.
        max_length: columns that the samples of a row may take.
        pad_token_id: pads rows.
        response_padding_id: pads a response to whole blocks: the end-of-sequence token.
        pad_to_multiple_of: rows are as long as the longest, rounded up to a multiple of this.
        noisy_copies: 1, or 2 for noisy copies that complement each other; prompt and clean copy are there once.

    Raises:
        ValueError: a sample is inconsistent, or takes more columns than a row has; the message names it.
    """
    if block_size < 1 or pad_to_multiple_of < 1:
        raise ValueError(
            f"`block_size` and `pad_to_multiple_of` must be positive, got {block_size} and {pad_to_multiple_of}"
        )
    lengths = []
    for number, sample in enumerate(samples):
        try:
            check_sample(sample)
            check_orders(sample, block_size)
        except ValueError as error:
            raise ValueError(f"sample {number} (id {sample.sample_id}): {error}") from error
        lengths.append(packed_length(sample.responses, len(sample.input_ids), block_size, noisy_copies))
        if lengths[-1] > max_length:
            raise ValueError(
                f"sample {number} (id {sample.sample_id}) takes {lengths[-1]} columns in blocks of {block_size}, "
                f"`max_length` is {max_length}: `truncate` it or leave it out"
            )
    samples = [_keep(sample, sample.responses) for sample in samples]
    laid_out = [_lay_out(sample, block_size, response_padding_id, noisy_copies) for sample in samples]
    visual_inputs = _join_visual(samples, laid_out)
    for number, columns in enumerate(laid_out):
        columns["sample"] = torch.full_like(columns["place"], number)
    rows = first_fit_decreasing(lengths, max_length) or [[]]
    width = max(1, *(sum(lengths[number] for number in row) for row in rows))
    width = whole_blocks(width, pad_to_multiple_of)
    padding = _padding(pad_token_id, width)
    joined = [_join([laid_out[number] for number in row] + [padding], width) for row in rows]
    tensors = {name: torch.stack([row[name] for row in joined], dim=-2) for name in padding}
    # The column: in the positions that transformers reads boundaries of packed sequences from, the row is one sequence.
    text = torch.arange(width).expand(1, len(rows), -1)
    tensors["position_ids"] = torch.cat([text, tensors["position_ids"]])
    sample_ids = torch.tensor([sample.sample_id for sample in samples], dtype=torch.long)
    return PackedRows(block_size=block_size, visual_inputs=visual_inputs, sample_ids=sample_ids, **tensors)


Columns = dict[str, torch.Tensor]  # by the names of `PackedRows`, (columns,) each, `position_ids` (3, columns)


def _lay_out(sample: Sample, block_size: int, response_padding_id: int, noisy_copies: int) -> Columns:
    """The columns of one sample as if it began in column 0: base, then tail and all copies of every turn."""
    end_of_base = sample.responses[-1][0] // block_size * block_size
    parts = [_part(0, end_of_base, turn=0, stream=BASE, origin=0, anchor=EVERYTHING)]
    ends = [end_of_base]
    num_columns = end_of_base
    for turn, (start, end) in enumerate(sample.responses, start=1):
        anchor = start // block_size * block_size
        width = whole_blocks(end - start, block_size)
        shared = {"turn": turn, "origin": start, "anchor": anchor}
        parts.append(_part(anchor, start + width, stream=CLEAN, **shared))
        num_columns += start + width - anchor
        noisy = _part(start, start + width, stream=NOISY, **shared)
        if sample.orders:
            noisy["order"] = sample.orders[turn - 1]
        noisy["twin"] = torch.arange(num_columns - width, num_columns)
        noisy["previous"] = noisy["twin"] - 1
        if start == anchor:  # no tail: the token before the response is in the base
            noisy["previous"][0] = start - 1
        parts += [{**noisy, "view": torch.full_like(noisy["view"], view)} for view in range(noisy_copies)]
        num_columns += noisy_copies * width
        ends += [end] * (1 + noisy_copies)
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    end_of_text = torch.tensor(ends).repeat_interleave(torch.tensor([len(part["place"]) for part in parts]))
    behind = (columns["place"] - end_of_text + 1).clamp(min=0)
    source = columns["place"] - behind
    is_padding = behind > 0
    return {
        **columns,
        "input_ids": sample.input_ids[source].masked_fill(is_padding, response_padding_id),
        "position_ids": sample.position_ids[:, source] + behind,
        "visual_index": sample.visual_index[source],
        "is_response_padding": is_padding,
    }


def _part(start: int, end: int, **constants: int) -> Columns:
    """Columns of the places [start, end) with the same constants, without twins or an order."""
    place = torch.arange(start, end)
    nothing = torch.full_like(place, -1)
    columns = {name: torch.full_like(place, value) for name, value in {"view": 0, **constants}.items()}
    return {"place": place, "twin": nothing, "previous": nothing, "order": nothing, **columns}


def _padding(pad_token_id: int, width: int) -> Columns:
    zeros, nothing = torch.zeros(width, dtype=torch.long), torch.full((width,), -1)
    return {
        "input_ids": torch.full((width,), pad_token_id),
        "position_ids": zeros.expand(3, -1),
        **dict.fromkeys(("visual_index", "sample", "twin", "previous", "order"), nothing),
        **dict.fromkeys(("turn", "stream", "view", "place", "origin"), zeros),
        "anchor": torch.full((width,), EVERYTHING),
        "is_response_padding": zeros.bool(),
    }


def _join(parts: list[Columns], width: int) -> Columns:
    """Lay parts side by side, cut to `width` columns."""
    firsts = torch.tensor([0] + [len(part["place"]) for part in parts[:-1]]).cumsum(0).tolist()
    joined = {}
    for name in parts[-1]:
        values = [part[name] for part in parts]
        if name in ("twin", "previous"):
            values = [torch.where(value >= 0, value + first, -1) for value, first in zip(values, firsts, strict=True)]
        joined[name] = torch.cat(values, dim=-1)[..., :width]
    return joined


def _join_visual(samples: Sequence[Sample], laid_out: list[Columns]) -> dict[str, torch.Tensor]:
    """Join the pixels and grids of all samples; make their `visual_index` point into the features of the batch."""
    counts = [[int(features.sum()) for features in sample.features_per_item()] for sample in samples]
    num_images = sum(images for images, _ in counts)
    first_image, first_video = 0, num_images
    for (images, videos), columns in zip(counts, laid_out, strict=True):
        index = columns["visual_index"]
        moved = torch.where(index < images, index + first_image, index - images + first_video)
        columns["visual_index"] = torch.where(index < 0, -1, moved)
        first_image, first_video = first_image + images, first_video + videos
    return {
        name: torch.cat([sample.visual_inputs[name] for sample in samples if name in sample.visual_inputs])
        for name in VISUAL_INPUTS
        if any(name in sample.visual_inputs for sample in samples)
    }


__all__ = [
    "BASE",
    "CLEAN",
    "NEVER",
    "NOISY",
    "Layout",
    "PackedRows",
    "Sample",
    "check_orders",
    "check_responses",
    "check_sample",
    "deal",
    "dense_mask",
    "fair",
    "first_fit_decreasing",
    "flex_mask",
    "pack",
    "packed_length",
    "truncate",
    "until",
    "visible",
    "whole_blocks",
]
