"""A table of tokens, and windows of it encoded into a cache.

A batch lives in one table, every row from column 0: its prompt, then its response in blocks. Every forward encodes a
window of columns under one rule, a token sees its own and earlier blocks (see masking_bard_vl), and writes the window's
keys and values in place.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .attention_bard_vl import ATTENTION_NAME
from .cache_bard_vl import BardVLCache, CacheWindow
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
        """Ids (n, width), positions (4, n, width) and blocks (n, width) of `rows` (n,) at `columns` (n, width)."""
        rows = rows[:, None]
        return self.ids[rows, columns], self.positions[:, rows, columns], self.blocks[rows, columns]

    def repeat_rows(self, times: int) -> None:
        """Repeat every row `times` times, next to itself."""
        self.ids = self.ids.repeat_interleave(times, dim=0)
        self.positions = self.positions.repeat_interleave(times, dim=1)
        self.blocks = self.blocks.repeat_interleave(times, dim=0)
        self.lengths = self.lengths.repeat_interleave(times, dim=0)


class WindowEncoder:
    """Encodes windows of a token table into hidden states, and their keys and values into a cache."""

    def __init__(self, model: Any, table: TokenTable, cache: BardVLCache, fixed: bool = False):
        self.model, self.table, self.cache, self.fixed = model, table, cache, fixed
        self.attention = model.config.text_config._attn_implementation
        self.device = table.ids.device

    def encode_prompts(self, prompt: Prompt, first: int, behind: int, chunk: int | None = None) -> "PromptStates":
        """Encode every row's prompt from column `first` on, images included, and `behind` columns behind it.

        With `chunk`, columns, in forwards of so many columns; the last one takes what is behind the prompts along.
        """
        features = self.model.model.encode_visual(prompt.input_ids, prompt.visual_inputs, first)
        rows = torch.arange(len(prompt.host_lengths), device=self.device)
        longest, num_chunks = max(prompt.host_lengths), 1
        while chunk is not None and longest - first > chunk:
            self.encode(rows, [first] * len(rows), chunk, features)
            first, num_chunks = first + chunk, num_chunks + 1
        # A row whose prompt has ended in an earlier chunk takes part with what is behind it alone.
        starts = [min(first, length) for length in prompt.host_lengths]
        hidden = self.encode(rows, starts, longest + behind - first, features)
        offsets = torch.tensor([n - s for n, s in zip(prompt.host_lengths, starts, strict=True)], device=self.device)
        return PromptStates(hidden, offsets, num_chunks)

    def encode(
        self,
        rows: torch.Tensor,
        starts: list[int],
        width: int,
        features: VisualFeatures | None = None,
        num_carried: int | None = None,
    ) -> torch.Tensor:
        """Encode a window of every row.

        Args:
            rows: (n,) rows of the table, in the order of the cache's.
            starts: first column of each row's window.
            width: columns of the window.
            features: visual features, for windows that hold prompt tokens.
            num_carried: if every window is one block behind so many tokens of a finished one, their number: where all
                windows begin in the same column, no mask is needed then.

        Returns:
            (n, width, hidden) hidden states after the last norm.
        """
        start, end = starts[0] if len(set(starts)) == 1 else None, max(starts) + width
        first = torch.tensor(starts, device=self.device)
        columns = first[:, None] + torch.arange(width, device=self.device)
        window = CacheWindow(columns, start, end, max(end, self.table.num_columns), self.fixed)
        ids, positions, blocks = self.table.window(rows, columns)
        if start is not None and num_carried is not None and self.attention == ATTENTION_NAME:
            return self.forward(ids, positions, window, None, features, num_clean=num_carried)
        visible = self.table.blocks[rows, None, :end] <= blocks[:, :, None]
        return self.forward(ids, positions, window, visible, features)

    def encode_unread(self, rows: torch.Tensor, first: torch.Tensor, width: int, end: int) -> torch.Tensor:
        """Encode windows whose first columns (n,) the host has not read; none reaches past column `end`."""
        columns = first[:, None] + torch.arange(width, device=self.device)
        ids, positions, blocks = self.table.window(rows, columns)
        visible = self.table.blocks[rows, None, :end] <= blocks[:, :, None]
        window = CacheWindow(columns, None, end, max(end, self.table.num_columns))
        return self.forward(ids, positions, window, visible)

    def encode_masked_copies(self, answer_positions: torch.Tensor, block_size: int, mask_token_id: int) -> torch.Tensor:
        """Hidden state of every answer token masked alone in a copy of its block: (rows, positions, hidden).

        The copies lie side by side in columns behind the table. A copy sees the blocks before its own, and itself.
        """
        table, device = self.table, answer_positions.device
        rows = torch.arange(len(table.lengths), device=device)
        start = answer_positions // block_size * block_size
        source = start[:, None] + torch.arange(block_size, device=device)
        source = table.lengths[:, None] + source.flatten()
        ids, positions, blocks = table.window(rows, source)
        masked = torch.arange(len(answer_positions), device=device) * block_size + answer_positions - start
        ids = ids.index_fill(1, masked, mask_token_id)
        copy = torch.arange(len(answer_positions), device=device).repeat_interleave(block_size)
        before = table.blocks[:, None, :] < blocks[:, :, None]
        own = (copy[:, None] == copy[None]).expand(len(rows), -1, -1)
        behind = torch.arange(len(copy), device=device) + table.num_columns
        end = table.num_columns + len(copy)
        window = CacheWindow(behind.expand(len(rows), -1), table.num_columns, end, end)
        hidden = self.forward(ids, positions, window, torch.cat([before, own], dim=-1))
        return hidden[:, masked]

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        window: CacheWindow,
        visible: torch.Tensor | None,
        features: VisualFeatures | None = None,
        num_clean: int | None = None,
    ) -> torch.Tensor:
        """One forward of the language model.

        Args:
            ids: (n, width); positions: (4, n, width).
            window: where in the cache the keys and values go.
            visible: (n, width, window end) what each token sees, or None for all but what `num_clean` of
                `block_attention` hides.
            features: visual features.
            num_clean: see `block_attention`.
        """
        text_model = self.model.model.language_model
        embeds = text_model.embed_tokens(ids)
        extras: dict[str, Any] = {} if visible is not None else {"num_clean": num_clean}
        if features is not None:
            padded = torch.nn.functional.pad(features.index, [0, self.table.num_columns], value=-1)
            index = padded.gather(1, window.columns)
            is_visual = index >= 0
            chosen = index[is_visual].to(features.embeds.device)
            embeds = embeds.masked_scatter(
                is_visual[..., None].to(embeds.device), features.embeds[chosen].to(embeds.device, embeds.dtype)
            )
            extras["visual_pos_masks"] = is_visual
            extras["deepstack_visual_embeds"] = [layer[chosen] for layer in features.deepstack]
        with self.cache.writing(window):
            return text_model(
                inputs_embeds=embeds,
                attention_mask=None if visible is None else to_attention_mask(visible, self.attention, embeds.dtype),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                **extras,
            )[0]


@dataclass
class PromptStates:
    """What a prompt's last forward left.

    Attributes:
        hidden: (rows, width, hidden) hidden states.
        offsets: (rows,) where in them what is behind each prompt begins.
        num_chunks: forwards that it took.
    """

    hidden: torch.Tensor
    offsets: torch.Tensor
    num_chunks: int


__all__ = ["STATIC_COLUMNS", "PromptStates", "TokenTable", "WindowEncoder"]
