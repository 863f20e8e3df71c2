"""A table of tokens, and windows of it encoded into a cache.

A batch lives in one table, every row from column 0: its prompt, then its response in blocks. Every forward encodes a
window of columns of each row under one rule, a token sees its own and earlier blocks (see masking_bard_vl), and writes
the windows' keys and values in place. Windows of different widths run end to end as one sequence, without padding.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from .attention_bard_vl import ATTENTION_NAME
from .cache_bard_vl import BardVLCache, CacheWindow
from .compat_bard_vl import attention_of, encode_text
from .inputs_bard_vl import Prompt, VisualFeatures
from .masking_bard_vl import partition_sequence, to_attention_mask

STATIC_COLUMNS = 256  # static caches have a multiple of so many columns, so that calls of similar lengths share a graph


@dataclass
class TokenTable:
    """Tokens, positions and blocks of a batch, every row from column 0: prompt, response, room to spare.

    Attributes:
        ids: (rows, columns), the mask id where undecided.
        positions: (4, rows, columns) text position (the column), temporal, height and width.
        blocks: (rows, columns) block numbers, ascending along a row.
        lengths: (rows,) prompt tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    lengths: torch.Tensor

    @property
    def num_columns(self) -> int:
        """Columns of the table."""
        return self.ids.shape[1]

    @classmethod
    def lay_out(
        cls, prompt: Prompt, num_new_columns: int, block_size: int, mask_token_id: int, multiple: int = 1
    ) -> "TokenTable":
        """Lay prompts out with room for `num_new_columns` response tokens, all undecided, behind each.

        The number of columns is rounded up to a multiple of `multiple`.
        """
        rows, longest = prompt.input_ids.shape
        # One block to spare: a row that is not ready for the next block still takes part in a window of two.
        num_columns = -(-(longest + num_new_columns + block_size) // multiple) * multiple
        columns = torch.arange(num_columns, device=prompt.input_ids.device)
        behind = columns[None] - prompt.lengths[:, None]
        pad = [0, num_columns - longest]
        ids = torch.nn.functional.pad(prompt.input_ids, pad).masked_fill_(behind >= 0, mask_token_id)
        positions = torch.where(
            behind < 0,
            torch.nn.functional.pad(prompt.positions, pad),
            prompt.next_position[:, None] + behind,
        )
        text = columns.expand(1, rows, -1)
        blocks = partition_sequence(prompt.lengths, len(columns), block_size)
        return cls(ids, torch.cat([text, positions]), blocks, prompt.lengths)

    def window(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (n, width), positions (4, n, width) and blocks (n, width) of `rows`, which fit, at `columns`."""
        return self.ids[rows, columns], self.positions[:, rows, columns], self.blocks[rows, columns]

    def repeat_rows(self, times: int) -> None:
        """Repeat every row `times` times, next to itself."""
        self.ids = self.ids.repeat_interleave(times, dim=0)
        self.positions = self.positions.repeat_interleave(times, dim=1)
        self.blocks = self.blocks.repeat_interleave(times, dim=0)
        self.lengths = self.lengths.repeat_interleave(times, dim=0)


class WindowEncoder:
    """Encodes windows of a token table into hidden states, and their keys and values into a cache."""

    def __init__(self, model: Any, table: TokenTable, cache: BardVLCache):
        self.model, self.table, self.cache = model, table, cache
        self.attention = attention_of(model.config.text_config)
        self.device = table.ids.device

    def encode_prompts(
        self, prompt: Prompt, first: int, behind: int, chunk: int | None = None
    ) -> tuple[torch.Tensor, int]:
        """Encode every row's prompt from column `first` on, images included, and `behind` columns behind it.

        With `chunk`, columns, in forwards of so many columns; the last one takes what is behind the prompts along.

        Returns:
            (rows, behind, hidden) hidden states of what is behind the prompts, and the number of forwards.
        """
        features = self.model.model.encode_visual(prompt.input_ids, prompt.visual_inputs, first)
        lengths, num_forwards = prompt.host_lengths, 1
        rows = torch.arange(len(lengths), device=self.device)
        while chunk is not None and max(lengths) - first > chunk:
            widths = [min(max(length - first, 0), chunk) for length in lengths]
            self.encode(rows, [first] * len(rows), widths, 0, features)
            first, num_forwards = first + chunk, num_forwards + 1
        # A row whose prompt has ended in an earlier chunk takes part with what is behind it alone.
        starts = [min(first, length) for length in lengths]
        widths = [length + behind - start for length, start in zip(lengths, starts, strict=True)]
        return self.encode(rows, starts, widths, behind, features), num_forwards

    def encode(
        self,
        rows: torch.Tensor,
        starts: list[int],
        widths: list[int],
        num_kept: int,
        features: VisualFeatures | None = None,
        num_carried: int | None = None,
    ) -> torch.Tensor:
        """Encode a window of every row.

        Args:
            rows: (n,) rows of the table, in the order of the cache's.
            starts, widths: first column of each row's window, and its columns.
            num_kept: columns at the end of each window whose hidden states are wanted.
            features: visual features, for windows that hold prompt tokens.
            num_carried: if every window is one block behind so many tokens of a finished one, their number: where all
                windows begin in the same column, no mask is needed then.

        Returns:
            (n, num_kept, hidden) hidden states after the last norm.
        """
        width = max(widths)
        first, own = torch.tensor([starts, widths], device=self.device)
        columns = first[:, None] + torch.arange(width, device=self.device)
        if len(set(widths)) > 1 and self.attention == ATTENTION_NAME:
            end = max(start + own for start, own in zip(starts, widths, strict=True))
            slots = torch.arange(len(rows)).repeat_interleave(torch.tensor(widths)).to(self.device)
            begins = own.cumsum(0) - own
            places = torch.arange(len(slots), device=self.device) - begins[slots]
            window = CacheWindow(
                slots[None], columns[slots, places][None], len(rows), None, end, self.table.num_columns
            )
            visible, places = self.visible(rows, columns, end), slots * width + places
            hidden = self.forward(rows[slots][None], window, visible, features, padded_places=places)
            return take(hidden.expand(len(rows), -1, -1), begins + own - num_kept, num_kept)
        # With other attention, shorter windows run on into columns that are encoded again before they are seen.
        start, end = starts[0] if len(set(starts)) == 1 else None, max(starts) + width
        window = self.batch_window(columns, start, end)
        if start is not None and num_carried is not None and self.attention == ATTENTION_NAME:
            hidden = self.forward(rows[:, None], window, None, features, num_clean=num_carried)
        else:
            hidden = self.forward(rows[:, None], window, self.visible(rows, columns, end), features)
        return take(hidden, own - num_kept, num_kept)

    def encode_unread(
        self, rows: torch.Tensor, first: torch.Tensor, width: int, end: int, offsets: torch.Tensor, num_kept: int
    ) -> torch.Tensor:
        """Encode windows whose first columns (n,) the host has not read; none reaches past column `end`.

        Returns:
            (n, num_kept, hidden) hidden states from `offsets` (n,) in each window on.
        """
        columns = first[:, None] + torch.arange(width, device=self.device)
        window = self.batch_window(columns, None, end)
        return take(self.forward(rows[:, None], window, self.visible(rows, columns, end)), offsets, num_kept)

    def batch_window(self, columns: torch.Tensor, start: int | None, end: int) -> CacheWindow:
        """The place in the cache of (n, width) columns of its first n rows."""
        slots = torch.arange(len(columns), device=self.device)[:, None]
        return CacheWindow(slots, columns, len(columns), start, end, max(end, self.table.num_columns))

    def visible(self, rows: torch.Tensor, columns: torch.Tensor, end: int) -> torch.Tensor:
        """(n, width, end) which of the first columns the tokens at `columns` (n, width) of `rows` (n,) see."""
        blocks = self.table.blocks[rows]
        return blocks[:, None, :end] <= blocks.gather(1, columns)[:, :, None]

    def encode_masked_copies(self, answer_positions: torch.Tensor, block_size: int, mask_token_id: int) -> torch.Tensor:
        """Hidden state of every answer token masked alone in a copy of its block: (rows, positions, hidden).

        The copies lie side by side in columns behind the table. A copy sees the blocks before its own, and itself.
        """
        table, device = self.table, answer_positions.device
        rows = torch.arange(len(table.lengths), device=device)
        start = answer_positions // block_size * block_size
        source = start[:, None] + torch.arange(block_size, device=device)
        source = table.lengths[:, None] + source.flatten()
        ids, positions, blocks = table.window(rows[:, None], source)
        masked = torch.arange(len(answer_positions), device=device) * block_size + answer_positions - start
        ids = ids.index_fill(1, masked, mask_token_id)
        copy = torch.arange(len(answer_positions), device=device).repeat_interleave(block_size)
        before = table.blocks[:, None, :] < blocks[:, :, None]
        own = (copy[:, None] == copy[None]).expand(len(rows), -1, -1)
        behind = torch.arange(len(copy), device=device) + table.num_columns
        end = table.num_columns + len(copy)
        window = self.batch_window(behind.expand(len(rows), -1), table.num_columns, end)
        return self.run(ids, positions, window, torch.cat([before, own], dim=-1))[:, masked]

    def forward(
        self,
        rows: torch.Tensor,
        window: CacheWindow,
        visible: torch.Tensor | None,
        features: VisualFeatures | None = None,
        **attention: Any,
    ) -> torch.Tensor:
        """Encode the window's columns of `rows`, which are as many or fit them; see `run`."""
        columns = window.columns
        rows = rows.expand_as(columns)
        if features is not None:
            padded = torch.nn.functional.pad(features.index, [0, self.table.num_columns], value=-1)
            features = replace(features, index=padded[rows, columns])
        return self.run(
            self.table.ids[rows, columns],
            self.table.positions[:, rows, columns],
            window,
            visible,
            features,
            **attention,
        )

    def run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        window: CacheWindow,
        visible: torch.Tensor | None,
        features: VisualFeatures | None = None,
        **attention: Any,
    ) -> torch.Tensor:
        """One forward of the language model.

        Args:
            ids: (n, width); positions: (4, n, width).
            window: where in the cache the keys and values go.
            visible: (rows, queries, window end) what each token sees, or None for all but what `num_clean` hides.
            features: visual features, their index that of the (n, width) tokens.
            attention: further arguments of `block_attention`.

        Returns:
            (n, width, hidden) hidden states after the last norm.
        """
        text_model = self.model.model.language_model
        embeds = text_model.embed_tokens(ids)
        if features is not None:
            embeds, deepstack = features.show(embeds)
            attention |= deepstack
        mask = None if visible is None else to_attention_mask(visible, self.attention, embeds.dtype)
        with self.cache.writing(window):
            return encode_text(text_model, embeds, mask, positions, self.cache, use_cache=True, **attention)[0]


def take(hidden: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    """(n, count, hidden) of (n, width, hidden) states: `count` of each row from its offset (n,) on."""
    columns = (offsets[:, None] + torch.arange(count, device=offsets.device)).to(hidden.device)
    return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))


__all__ = ["STATIC_COLUMNS", "TokenTable", "WindowEncoder", "take"]
