"""The decoding engine: a table of tokens, windows of it encoded into a cache, rows that denoise block by block.

A batch lives in one table, every row from column 0: its prompt, then its response in blocks. Every forward encodes a
window of columns under one rule, a token sees its own and earlier blocks (see masking_bard_vl), and writes the window's
keys and values in place. A prompt therefore shares a forward with the first step of its first block, and a finished
block with the first step of the next; a separate pass to commit keys and values is never needed.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .cache_bard_vl import BardVLCache
from .generation_config_bard_vl import DecodingSettings
from .inputs_bard_vl import Prompt, VisualFeatures
from .masking_bard_vl import partition_sequence, to_attention_mask
from .remasking_bard_vl import REMASKING_RULES, choose_tokens, transfer_schedule


@dataclass
class DenoisingStep:
    """One step of one row's block.

    Attributes:
        block: index of the block in the response.
        ids: (block size,) CPU ids after the step, the mask id where undecided.
        committed: (block size,) bool, decided at this step.
        confidence: (block size,) probability of the token that each position would have taken.
    """

    block: int
    ids: torch.Tensor
    committed: torch.Tensor
    confidence: torch.Tensor


@dataclass
class DecodingHooks:
    """The caller's parts of the loop."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: Any
    generator: torch.Generator | None
    keep_history: bool
    deadline: float  # in the seconds of time.monotonic


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
    def lay_out(cls, prompt: Prompt, num_new_columns: int, block_size: int, mask_token_id: int) -> "TokenTable":
        """Lay prompts out with room for `num_new_columns` response tokens, all undecided, behind each."""
        rows, longest = prompt.input_ids.shape
        # One block to spare: a row that is not ready for the next block still takes part in a window of two.
        columns = torch.arange(longest + num_new_columns + block_size, device=prompt.input_ids.device)
        behind = columns[None] - prompt.lengths[:, None]
        pad = [0, num_new_columns + block_size]
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

    def __init__(self, model: Any, table: TokenTable, cache: BardVLCache):
        self.model, self.table, self.cache = model, table, cache
        self.attention = model.config.text_config._attn_implementation

    def encode_prompts(self, prompt: Prompt, first: int, end: int) -> torch.Tensor:
        """Encode columns [first, end) of every row, images included, behind columns that the cache holds already."""
        rows = torch.arange(len(prompt.lengths), device=prompt.lengths.device)
        features = self.model.model.encode_visual(prompt.input_ids, prompt.visual_inputs, first)
        return self.encode(rows, torch.full_like(rows, first), end - first, end, features)

    def encode(
        self, rows: torch.Tensor, first: torch.Tensor, width: int, end: int, features: VisualFeatures | None = None
    ) -> torch.Tensor:
        """Encode a window of every row.

        Args:
            rows: (n,) rows of the table, in the order of the cache's.
            first: (n,) first column of each row's window.
            width: columns of the window.
            end: no window reaches past this column.
            features: visual features, for windows that hold prompt tokens.

        Returns:
            (n, width, hidden) hidden states after the last norm.
        """
        columns = first[:, None] + torch.arange(width, device=first.device)
        ids, positions, blocks = self.table.window(rows, columns)
        visible = self.table.blocks[rows, None, :end] <= blocks[:, :, None]
        return self.forward(ids, positions, columns, visible, features)

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
        columns = (table.num_columns + torch.arange(len(copy), device=device)).expand(len(rows), -1)
        hidden = self.forward(ids, positions, columns, torch.cat([before, own], dim=-1))
        return hidden[:, masked]

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        columns: torch.Tensor,
        visible: torch.Tensor,
        features: VisualFeatures | None = None,
    ) -> torch.Tensor:
        """One forward of the language model: ids (n, width), positions (4, n, width), visible (n, width, end)."""
        text_model = self.model.model.language_model
        embeds = text_model.embed_tokens(ids)
        visual: dict[str, Any] = {}
        if features is not None:
            index = torch.nn.functional.pad(features.index, [0, self.table.num_columns], value=-1).gather(1, columns)
            is_visual = index >= 0
            chosen = index[is_visual].to(features.embeds.device)
            embeds = embeds.masked_scatter(
                is_visual[..., None].to(embeds.device), features.embeds[chosen].to(embeds.device, embeds.dtype)
            )
            visual["visual_pos_masks"] = is_visual
            visual["deepstack_visual_embeds"] = [layer[chosen] for layer in features.deepstack]
        end = visible.shape[-1]
        capacity = max(end, self.table.num_columns)
        with self.cache.writing(columns, end, capacity):
            return text_model(
                inputs_embeds=embeds,
                attention_mask=to_attention_mask(visible, self.attention, embeds.dtype),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                **visual,
            )[0]


class BlockDecoder:
    """The state of one call of `generate`: each row denoises its own block at its own pace.

    `rows` lists the rows that are still decoding in the order of the cache's rows; everything else is by row.
    """

    def __init__(
        self, model: Any, prompt: Prompt, settings: DecodingSettings, cache: BardVLCache, hooks: DecodingHooks
    ):
        self.model, self.prompt, self.settings, self.cache, self.hooks = model, prompt, settings, cache, hooks
        num_blocks = -(-settings.max_new_tokens // settings.block_size)
        self.table = TokenTable.lay_out(
            prompt, num_blocks * settings.block_size, settings.block_size, settings.mask_token_id
        )
        self.encoder = WindowEncoder(model, self.table, cache)
        self.device = prompt.input_ids.device
        self.schedule = transfer_schedule(settings.block_size, settings.denoising_steps).to(self.device)
        self.eos = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=self.device)
        self.num_forwards: Counter[str] = Counter()
        num_rows = len(prompt.lengths) * settings.num_return_sequences
        self.lengths = [n for n in prompt.host_lengths for _ in range(settings.num_return_sequences)]
        self.rows = list(range(num_rows))
        self.steps: list[list[int]] = [[0] for _ in range(num_rows)]  # per row and block
        self.response_lengths = [0] * num_rows
        self.history: list[list[DenoisingStep]] = [[] for _ in range(num_rows)]
        self.confidences = torch.zeros(num_rows, self.table.num_columns, device=self.device)
        self.logits = torch.empty(0)

    def prefill(self, reused: int) -> None:
        """Encode the prompts from column `reused` on, together with the first step of every first block."""
        size, copies = self.settings.block_size, self.settings.num_return_sequences
        hidden = self.encoder.encode_prompts(self.prompt, reused, max(self.lengths) + size)
        self.num_forwards["prefill+denoise" if max(self.lengths) > reused else "denoise"] += 1
        self.logits = self._block_logits(hidden, self.table.lengths - reused)
        if copies > 1:
            self.cache.repeat_rows(copies)
            self.table.repeat_rows(copies)
            self.logits = self.logits.repeat_interleave(copies, dim=0)

    def step(self) -> None:
        """Decide on the last forward's logits, let rows end or move on, and encode the next forward's windows."""
        finished = self._denoise()
        ended = {row for row in self.rows if finished[row] and self._finish_block(row)}
        for row in ended:
            slot = self.rows.index(row)
            self.cache.retire(slot, len(self.rows) - 1)
            self.rows[slot] = self.rows[-1]
            self.rows.pop()
        if self.rows:
            self._encode_windows({row for row in self.rows if finished[row]})

    def _denoise(self) -> list[bool]:
        """Choose and commit tokens in every row's block; say by row whether its block is finished."""
        settings, mask_id = self.settings, self.settings.mask_token_id
        rows = torch.tensor(self.rows, device=self.device)
        start = torch.tensor([self._block_start(row) for row in self.rows], device=self.device)
        cell = (rows[:, None], start[:, None] + torch.arange(settings.block_size, device=self.device))
        block = self.table.ids[cell]
        masked = block == mask_id
        if self.hooks.processors:
            self._process_logits(masked)
        ids, confidence = choose_tokens(
            self.logits, mask_id, settings.temperature, settings.top_k, settings.top_p, self.hooks.generator
        )
        quota = self.schedule[torch.tensor([self.steps[row][-1] for row in self.rows], device=self.device)]
        rule = REMASKING_RULES[settings.remasking_strategy]
        commit = rule(confidence, masked, quota, settings.confidence_threshold)
        block = torch.where(commit, ids, block)
        self.table.ids[cell] = block
        self.confidences[cell] = torch.where(commit, confidence, self.confidences[cell])
        for row in self.rows:
            self.steps[row][-1] += 1
        self._report(block, commit, confidence)
        finished = dict(zip(self.rows, (block != mask_id).all(-1).tolist(), strict=True))
        return [finished.get(row, False) for row in range(len(self.steps))]

    def _process_logits(self, masked: torch.Tensor) -> None:
        """Run the logits processors at every undecided position with the committed tokens left of it."""
        logits = self.logits.float()
        for slot, row in enumerate(self.rows):
            start = self._block_start(row)
            for offset in masked[slot].nonzero()[:, 0].tolist():
                left = self.table.ids[row, : start + offset]
                left = left[left != self.settings.mask_token_id]
                logits[slot, offset] = self.hooks.processors(left[None], logits[slot, offset][None])[0]
        self.logits = logits

    def _report(self, block: torch.Tensor, commit: torch.Tensor, confidence: torch.Tensor) -> None:
        """Hand a draft to the streamer and keep the history, if asked."""
        if hasattr(self.hooks.streamer, "put_draft"):
            self.hooks.streamer.put_draft(value=block.cpu())
        if self.hooks.keep_history:
            for row, *parts in zip(self.rows, block.cpu(), commit.cpu(), confidence.cpu(), strict=True):
                self.history[row].append(DenoisingStep(len(self.steps[row]) - 1, *parts))

    def _finish_block(self, row: int) -> bool:
        """Find the end of the response in a finished block; without one, go to the next block. True if it ended."""
        size, start = self.settings.block_size, self._block_start(row)
        done = start - self.lengths[row]
        tokens = self.table.ids[row, start : start + size][: self.settings.max_new_tokens - done]
        is_eos = torch.isin(tokens, self.eos).tolist()
        kept = is_eos.index(True) + 1 if any(is_eos) else len(tokens)
        ended = any(is_eos) or done + kept == self.settings.max_new_tokens or time.monotonic() > self.hooks.deadline
        for count in range(1, kept + 1) if self.hooks.criteria else ():
            if bool(self.hooks.criteria(self.table.ids[row, : start + count][None], None).all()):
                kept, ended = count, True
                break
        if self.hooks.streamer is not None:
            self.hooks.streamer.put(tokens[None, :kept].cpu())
        self.response_lengths[row] = done + kept
        if not ended:
            self.steps[row].append(0)
        return ended

    def _encode_windows(self, moved_on: set[int]) -> None:
        """Encode every row's block; rows that moved on encode their finished block, now clean, in the same window."""
        size = self.settings.block_size
        carried = torch.tensor([size if row in moved_on else 0 for row in self.rows], device=self.device)
        start = torch.tensor([self._block_start(row) for row in self.rows], device=self.device)
        width = 2 * size if moved_on else size
        end = max(self._block_start(row) + (width if row not in moved_on else size) for row in self.rows)
        hidden = self.encoder.encode(torch.tensor(self.rows, device=self.device), start - carried, width, end)
        self.num_forwards["commit+denoise" if moved_on else "denoise"] += 1
        self.logits = self._block_logits(hidden, carried)

    def _block_logits(self, hidden: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Logits (n, block, vocabulary) of the block that begins `offset` (n,) tokens into each window."""
        columns = offset[:, None] + torch.arange(self.settings.block_size, device=self.device)
        columns = columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        return self.model.lm_head(hidden.gather(1, columns)).to(self.device)

    def _block_start(self, row: int) -> int:
        """Column of the first token of the row's current block."""
        return self.lengths[row] + (len(self.steps[row]) - 1) * self.settings.block_size

    def responses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Response ids (rows, longest) padded on the right, and the confidence of each token, 0 for padding."""
        longest = max(self.response_lengths)
        columns = torch.arange(longest, device=self.device)
        cell = (torch.arange(len(self.lengths), device=self.device)[:, None], self.table.lengths[:, None] + columns)
        padding = columns >= torch.tensor(self.response_lengths, device=self.device)[:, None]
        ids = self.table.ids[cell].masked_fill(padding, self.settings.pad_token_id)
        return ids, self.confidences[cell].masked_fill(padding, 0.0)

    def tokens_per_forward(self) -> torch.Tensor:
        """(rows,) response tokens over forwards; each forward of a row is one of its steps, nothing else is encoded."""
        forwards = torch.tensor([sum(steps) for steps in self.steps])
        return torch.tensor(self.response_lengths) / forwards

    def step_counts(self) -> torch.Tensor:
        """(rows, blocks) steps of each block, 0 where a row has no such block."""
        blocks = max(len(steps) for steps in self.steps)
        return torch.tensor([steps + [0] * (blocks - len(steps)) for steps in self.steps])

    def reference_statistics(self) -> dict[str, Any]:
        """The reference's `return_step_stats`, with tokens counted to the first EOS."""
        counts = self.step_counts()
        tokens, steps = sum(self.response_lengths), int(counts.sum())
        return {
            "block_step_counts": counts,
            "num_response_tokens": tokens,
            "num_denoising_steps": steps,
            "tpf": tokens / steps,
        }

    def encoded_contents(self, contents: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the cache holds of each row in the partition of a later prompt, which is cut from position 0.

        A response's blocks begin where its prompt ended: only behind a prompt of whole blocks they fit that partition.
        """
        size, encoded = self.settings.block_size, []
        for row, length in enumerate(self.lengths):
            known = contents[row // self.settings.num_return_sequences]
            whole = length // size * size
            if whole == length:
                committed = (len(self.steps[row]) - 1) * size
                known = torch.cat([known, self.table.ids[row, length : length + committed].cpu()])
                whole = length + committed
            encoded.append(known[:whole])
        return encoded


__all__ = ["BlockDecoder", "DecodingHooks", "DenoisingStep", "TokenTable", "WindowEncoder"]
