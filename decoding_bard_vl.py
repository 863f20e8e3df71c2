"""The decoding engine: rows that denoise their responses block by block, each at its own pace.

A prompt shares a forward with the first step of its first block, and a finished block with the first step of the next;
a separate pass to commit keys and values is never needed.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from .cache_bard_vl import BardVLCache, Buffers
from .compilation_bard_vl import compiled_step
from .generation_config_bard_vl import DecodingSettings
from .hooks_bard_vl import DecodingHooks
from .inputs_bard_vl import Prompt
from .remasking_bard_vl import REMASKING_RULES, Choice, Chooser, in_order, overwritten, remasked, transfer_schedule
from .windows_bard_vl import STATIC_COLUMNS, TokenTable, WindowEncoder


@dataclass
class DenoisingStep:
    """One step of one row's block.

    Attributes:
        block: index of the block in the response.
        ids: (block size,) CPU ids after the step, the mask id where undecided.
        committed: (block size,) bool, decided at this step.
        revised: (block size,) bool, decided before and changed, or masked again, at this step.
        confidence: (block size,) probability of the token that each position would have taken.
    """

    block: int
    ids: torch.Tensor
    committed: torch.Tensor
    revised: torch.Tensor
    confidence: torch.Tensor


class BlockDecoder:
    """The state of one call of `generate`: each row denoises its own block at its own pace.

    The state is on the device and by row. `rows` lists the rows that are still decoding, in the order of the cache's.
    The host reads which rows finished a block, or ended, after every `check_interval` forwards, earlier if no row can
    take that many more steps. Between two readings every window has room for a finished block and the next.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        limits: list[int],
        settings: DecodingSettings,
        cache: BardVLCache,
        hooks: DecodingHooks,
    ):
        self.model, self.prompt, self.settings, self.cache, self.hooks = model, prompt, settings, cache, hooks
        size, copies = settings.block_size, settings.num_return_sequences
        num_blocks = -(-settings.max_new_tokens // size)
        multiple = STATIC_COLUMNS if settings.is_static else 1
        self.table = TokenTable.lay_out(prompt, num_blocks * size, size, settings.mask_token_id, multiple)
        self.encoder = WindowEncoder(model, self.table, cache)
        self.device = prompt.input_ids.device
        self.schedule = transfer_schedule(size, settings.denoising_steps).to(self.device)
        self.eos = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=self.device)
        self.lengths = [n for n in prompt.host_lengths for _ in range(copies)]
        self.limits = [limit for limit in limits for _ in range(copies)]  # most response tokens of each row
        num_rows = len(self.lengths)

        self.rows = list(range(num_rows))
        self.slots = torch.arange(num_rows, device=self.device)  # `rows` on the device
        self.starts = list(self.lengths)  # host: first column of each row's block, as last read
        self.block_start = torch.tensor(self.lengths, device=self.device)
        self.device_limits = torch.tensor(self.limits, device=self.device)  # `limits` on the device
        self.steps = torch.zeros(num_rows, num_blocks, dtype=torch.long, device=self.device)  # per block
        self.carries = torch.zeros(num_rows, dtype=torch.bool, device=self.device)  # a finished block to encode clean
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        self.response_length = torch.zeros(num_rows, dtype=torch.long, device=self.device)
        self.confidences = torch.zeros(num_rows, self.table.num_columns, dtype=torch.float32, device=self.device)
        self.history: list[list[DenoisingStep]] = [[] for _ in range(num_rows)]
        self.chooser = Chooser(
            settings.mask_token_id,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            REMASKING_RULES[settings.remasking_strategy].measure,
            keeps_present=settings.revision == "remask",
        )
        self.choice: Choice  # of the last forward

        self.num_forwards: Counter[str] = Counter()
        self.num_prefill_forwards = 0  # beyond the one that holds the first step
        self.check_interval = 1 if hooks.any else settings.check_interval
        self.num_unread = 0  # steps since the host last read
        self.num_left = num_blocks * settings.denoising_steps  # steps that any row could still take when it read
        self.unread_kinds: list[torch.Tensor] = []  # of forwards whose kind the host does not know

    @property
    def static_shape(self) -> tuple[int, int]:
        """Rows and columns of a static cache."""
        return len(self.lengths), self.table.num_columns

    def prefill(self, reused: int, buffers: list[Buffers] | None) -> None:
        """Encode the prompts from column `reused` on, the last of them together with every first block's first step.

        With `buffers` the cache is static from then on, and lies in them.
        """
        size, copies = self.settings.block_size, self.settings.num_return_sequences
        hidden, num_forwards = self.encoder.encode_prompts(self.prompt, reused, size, self.settings.prefill_chunk_size)
        self.num_prefill_forwards = num_forwards - 1
        if self.num_prefill_forwards:
            self.num_forwards["prefill"] += self.num_prefill_forwards
        self.num_forwards["prefill+denoise" if max(self.lengths) > reused else "denoise"] += 1
        if copies > 1:
            self.cache.repeat_rows(copies)
            self.table.repeat_rows(copies)
            hidden = hidden.repeat_interleave(copies, dim=0)
        if buffers is not None:
            self.cache.move_to(buffers, self.table.num_columns)
        self.choice = self._choose(hidden)

    def step(self) -> None:
        """Decide on the last forward's logits, let rows end or move on, and encode the next forward's windows."""
        finished = self._denoise()
        self.num_unread += 1
        if self.num_unread < min(self.check_interval, self.num_left):
            self._encode_unread_windows()
            return
        moved_on = self._read(finished)
        if self.rows and self.check_interval == 1:
            self._encode_windows(moved_on)
        elif self.rows:
            self._encode_unread_windows()

    def _choose(self, hidden: torch.Tensor) -> Choice:
        """Choose tokens by (n, block size, hidden) states of each row's block, and measure how sure the model is.

        A CPU, which need not wait to count them, projects undecided positions alone, where nobody looks at the others:
        those have zeros then.
        """
        settings, hooks = self.settings, self.hooks
        processed = hooks.own_processors or hooks.processors
        all_matter = settings.revision or settings.temperature or processed or hooks.keep_history
        if all_matter or {hidden.device.type, self.device.type} != {"cpu"}:
            return self._choose_by(self.model.lm_head(hidden))
        held = self.table.ids[self._cell()]
        undecided = held == settings.mask_token_id
        logits = self.model.lm_head(hidden[undecided]).to(self.device)  # `device_map` may have the head elsewhere
        choice = self.chooser.choose(logits[None], held[undecided][None])
        ids, confidence, measure = (part.new_zeros(held.shape).masked_scatter(undecided, part) for part in choice[:3])
        return Choice(ids, confidence, measure, present=None)

    def _choose_by(self, logits: torch.Tensor) -> Choice:
        """The same by logits of every position."""
        logits, hooks = logits.to(self.device), self.hooks
        then = self._process_logits if hooks.processors else None
        if hooks.own_processors:
            ids, start = self.table.ids[self.slots], self.block_start[self.slots]
            return hooks.own_processors.choose(logits, ids, start, self.chooser, hooks.generator, then)
        logits = logits if then is None else then(logits.float(), 0)
        return self.chooser.choose(logits, self.table.ids[self._cell()], hooks.generator)

    def _cell(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of each row's block in the table."""
        place = torch.arange(self.settings.block_size, device=self.device)
        return self.slots[:, None], self.block_start[self.slots][:, None] + place

    def _denoise(self) -> torch.Tensor:
        """Commit tokens in every row's block, and move the rows on; (n,) bool, which finished a block."""
        settings, slots = self.settings, self.slots
        size, cell = settings.block_size, self._cell()
        offset = self.block_start[slots] - self.table.lengths[slots]
        step = (slots, offset // size)
        block, running, choice = self.table.ids[cell], ~self.ended[slots], self.choice
        masked = (block == settings.mask_token_id) & running[:, None]
        is_last = self.steps[step] >= len(self.schedule) - 1
        quota = torch.where(is_last, size, self.schedule[self.steps[step].clamp(max=len(self.schedule) - 1)])
        rule = REMASKING_RULES[settings.remasking_strategy]
        commit = rule.commit(choice.measure, masked, quota, getattr(settings, rule.bound))
        if choice.reads is not None:
            commit = in_order(commit, masked, quota, choice.reads)
        revised = self._revise(block, ~masked & running[:, None], is_last)
        again = revised & (settings.revision == "remask")
        block = torch.where(commit | revised, choice.ids, block).masked_fill(again, settings.mask_token_id)
        self.table.ids[cell] = block
        self.confidences[cell] = torch.where(commit | revised, choice.confidence, self.confidences[cell])
        self.steps[step] += running
        self._report(running, block, commit, revised, choice.confidence)

        finished = running & (block != settings.mask_token_id).all(-1)
        length, ends = self._response_end(block, offset)
        self.response_length[slots] = torch.where(finished, length, self.response_length[slots])
        self.ended[slots] |= finished & ends
        self.carries[slots] = finished & ~ends
        self.block_start[slots] += size * (finished & ~ends)
        return finished

    def _revise(self, block: torch.Tensor, visible: torch.Tensor, is_last: torch.Tensor) -> torch.Tensor:
        """(n, block size) visible positions that change; none is masked again at a block's last step."""
        settings, choice = self.settings, self.choice
        if settings.revision == "overwrite":
            return overwritten(block, visible, choice.ids, choice.confidence, settings.revision_threshold)
        if choice.present is not None:
            return remasked(choice.present, visible & ~is_last[:, None], settings.revision_threshold)
        return torch.zeros_like(visible)

    def _response_end(self, block: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Response tokens up to the end of each finished block (n, block size), EOS and limit heeded; is it the end?"""
        limits = self.device_limits[self.slots]
        room = (limits - offset).clamp(max=self.settings.block_size)
        place = torch.arange(self.settings.block_size, device=self.device)
        is_eos = torch.isin(block, self.eos) & (place < room[:, None])
        kept = torch.where(is_eos.any(-1), is_eos.long().argmax(-1) + 1, room)
        length = offset + kept
        return length, is_eos.any(-1) | (length == limits)

    def _process_logits(self, logits: torch.Tensor, first: int) -> torch.Tensor:
        """Run the caller's processors at every undecided position with the committed tokens left of it.

        The logits (rows, n, vocabulary) are those of `n` positions of each row's block, from index `first` on.
        """
        mask_token_id = self.settings.mask_token_id
        for slot, row in enumerate(self.rows):
            start = self.starts[row] + first
            block = self.table.ids[row, start : start + logits.shape[1]]
            for offset in (block == mask_token_id).nonzero()[:, 0].tolist():
                left = self.table.ids[row, : start + offset]
                left = left[left != mask_token_id]
                logits[slot, offset] = self.hooks.processors(left[None], logits[slot, offset][None])[0]
        return logits

    def _report(self, running: torch.Tensor, block: torch.Tensor, *decisions: torch.Tensor) -> None:
        """Hand a draft to the streamer and keep the history of the rows that are `running`, if asked."""
        if hasattr(self.hooks.streamer, "put_draft"):
            self.hooks.streamer.put_draft(value=block.cpu())
        if self.hooks.keep_history:
            parts_by_row = zip(self.rows, running.tolist(), *(x.cpu() for x in (block, *decisions)), strict=True)
            for row, is_running, *parts in parts_by_row:
                if is_running:
                    index = (self.starts[row] - self.lengths[row]) // self.settings.block_size
                    self.history[row].append(DenoisingStep(index, *parts))

    def _read(self, finished: torch.Tensor) -> set[int]:
        """Read who has ended and where the others are, run the caller's hooks, and let ended rows leave.

        Returns the rows that moved on to another block in the last step.
        """
        if self.hooks.watch_blocks:
            for row, is_finished in zip(self.rows, finished.tolist(), strict=True):
                if is_finished:
                    self._show_block(row)
        starts = self.block_start[self.slots]
        steps = self.steps[self.slots, (starts - self.table.lengths[self.slots]) // self.settings.block_size]
        state = torch.stack([starts, self.ended[self.slots].long(), steps]).tolist()
        moved_on, ended = set(), []
        self.num_unread = self.num_left = 0
        for row, start, is_ended, num_steps in zip(self.rows, *state, strict=True):
            if is_ended:
                ended.append(row)
            else:
                num_blocks = -(-(self.lengths[row] + self.limits[row] - start) // self.settings.block_size)
                self.num_left = max(self.num_left, num_blocks * self.settings.denoising_steps - num_steps)
                if start > self.starts[row]:
                    moved_on.add(row)
            self.starts[row] = start
        self._retire(ended)
        return moved_on

    def _show_block(self, row: int) -> None:
        """Show a finished block to the stopping criteria, prefix by prefix, and to the streamer."""
        start = self.starts[row]
        kept = int(self.response_length[row]) - (start - self.lengths[row])
        stopped = time.monotonic() > self.hooks.deadline
        for count in range(1, kept + 1) if self.hooks.criteria else ():
            if bool(self.hooks.criteria(self.table.ids[row, : start + count][None], None).all()):
                kept, stopped = count, True
                break
        if self.hooks.streamer is not None:
            self.hooks.streamer.put(self.table.ids[row, start : start + kept].cpu())
        if stopped:  # before the block was encoded clean: the cache ends where it begins
            self.response_length[row] = start - self.lengths[row] + kept
            self.ended[row], self.carries[row], self.block_start[row] = True, False, start

    def _retire(self, ended: list[int]) -> None:
        """Let rows leave the computation; where its shapes are fixed, all of them at once."""
        if self.settings.is_static:
            self.rows = self.rows if len(ended) < len(self.rows) else []
            return
        for row in ended:
            slot = self.rows.index(row)
            self.cache.retire(slot, len(self.rows) - 1)
            self.rows[slot] = self.rows[-1]
            self.rows.pop()
        if ended:
            self.slots = torch.tensor(self.rows, dtype=torch.long, device=self.device)

    def _encode_windows(self, moved_on: set[int]) -> None:
        """Encode every row's block; rows that moved on encode their finished block, now clean, in the same window."""
        size = self.settings.block_size
        self.num_forwards["commit+denoise" if moved_on else "denoise"] += 1
        if self.settings.is_static:
            self.choice = self._static_choice(2 * size if moved_on else size)
            return
        carried = [size if row in moved_on else 0 for row in self.rows]
        starts = [self.starts[row] - more for row, more in zip(self.rows, carried, strict=True)]
        alike = len(set(carried)) == 1
        hidden = self.encoder.encode(
            self.slots, starts, [size + more for more in carried], size, num_carried=carried[0] if alike else None
        )
        self.choice = self._choose(hidden)

    def _encode_unread_windows(self) -> None:
        """The same between two readings of the host: every window is two blocks wide."""
        size, slots = self.settings.block_size, self.slots
        running = ~self.ended[slots]
        self.unread_kinds.append(torch.stack([running.any(), (running & self.carries[slots]).any()]))
        if self.settings.is_static:
            self.choice = self._static_choice(2 * size)
            return
        carried = size * self.carries[slots]
        end = max(self.starts[row] for row in self.rows) + (self.num_unread + 2) * size
        first, end = self.block_start[slots] - carried, min(end, self.table.num_columns)
        hidden = self.encoder.encode_unread(slots, first, 2 * size, end, carried, size)
        self.choice = self._choose(hidden)

    def _static_choice(self, width: int) -> Choice:
        """The choice by the compiled step; samples and processed logits are chosen from outside of it."""
        table, encoder, size = self.table, self.encoder, self.settings.block_size
        carried = size * self.carries
        columns = (self.block_start - carried)[:, None] + torch.arange(width, device=self.device)
        hooks = self.hooks
        chooser = None if hooks.own_processors or hooks.processors or self.settings.temperature else self.chooser
        step = compiled_step(self.model, (*self.static_shape, width, size, chooser))
        with self.cache.writing(encoder.batch_window(columns, None, table.num_columns)):
            found = step(
                self.model.model.language_model, self.model.lm_head, self.cache, table, columns, carried, size,
                encoder.attention, chooser,
            )  # fmt: skip
        return self._choose_by(found) if chooser is None else found

    def responses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Response ids (rows, longest) padded on the right, and the confidence of each token, 0 for padding."""
        columns = torch.arange(int(self.response_length.max()), device=self.device)
        cell = (torch.arange(len(self.lengths), device=self.device)[:, None], self.table.lengths[:, None] + columns)
        padding = columns >= self.response_length[:, None]
        ids = self.table.ids[cell].masked_fill(padding, self.settings.pad_token_id)
        return ids, self.confidences[cell].masked_fill(padding, 0.0)

    def tokens_per_forward(self) -> torch.Tensor:
        """(rows,) response tokens over forwards: the row's steps, and those of its prompt that held no step."""
        return (self.response_length.float() / (self.steps.sum(-1) + self.num_prefill_forwards)).cpu()

    def step_counts(self) -> torch.Tensor:
        """(rows, blocks) steps of each block, 0 where a row has no such block."""
        return self.steps[:, : int(self.steps.any(0).sum())].cpu()

    def forwards_by_kind(self) -> dict[str, int]:
        """Forwards of the language model; `overrun` are those that no row had a use for."""
        kinds = Counter(self.num_forwards)
        for running, carrying in torch.stack(self.unread_kinds).tolist() if self.unread_kinds else ():
            kinds["commit+denoise" if carrying else "denoise" if running else "overrun"] += 1
        return dict(kinds)

    def reference_statistics(self) -> dict[str, Any]:
        """The reference's `return_step_stats`, with tokens counted to the first EOS."""
        counts = self.step_counts()
        tokens, steps = int(self.response_length.sum()), int(counts.sum())
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
        encoded = []
        for row, (length, committed) in enumerate(zip(self.lengths, self.block_start.tolist(), strict=True)):
            known = contents[row // self.settings.num_return_sequences]
            whole = length // self.settings.block_size * self.settings.block_size
            if whole == length:
                known = torch.cat([known, self.table.ids[row, length:committed].cpu()])
                whole = committed
            encoded.append(known[:whole])
        return encoded


__all__ = ["BlockDecoder", "DenoisingStep"]
