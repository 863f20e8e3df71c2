"""The decoding engine: rows that denoise their responses block by block, each at its own pace, as slots of one forward.

A slot is a block of queries of one row; it sees the columns of its row up to its own end. A block that is being
denoised is a slot, a finished block in front of the next is one more, a prompt is slots, too. So a prompt shares a
forward with the first step of its first block, and a finished block with the first step of the next; a separate pass to
commit keys and values is never needed.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .attention_bard_vl import ATTENTION_NAME, Slots
from .cache_bard_vl import BardVLCache, Writing
from .compat_bard_vl import attention_of, encode_text
from .generation_config_bard_vl import DecodingSettings
from .hooks_bard_vl import DecodingHooks
from .inputs_bard_vl import Prompt, VisualFeatures
from .masking_bard_vl import to_attention_mask
from .recording_bard_vl import COLUMNS, DEVICES, Recording, layers_of, recording
from .remasking_bard_vl import Choice
from .rows_bard_vl import Decision, Denoiser, Rows
from .structured_bard_vl import BlockForm


@dataclass
class DenoisingStep:
    """One step of one row's block, or a block that its form dictated without a step.

    Attributes:
        block: index of the block in the response.
        ids: (block size,) CPU ids after the step, the mask id where undecided.
        committed: (block size,) bool, decided at this step, or before the block's first one: dictated, or looked ahead.
        revised: (block size,) bool, decided before and changed, or masked again, at this step.
        confidence: (block size,) probability of the token that each position would have taken.
        chosen: (block size,) that token.
    """

    block: int
    ids: torch.Tensor
    committed: torch.Tensor
    revised: torch.Tensor
    confidence: torch.Tensor
    chosen: torch.Tensor


class SlotEncoder:
    """Encodes slots of a batch into hidden states, and their keys and values into the cache.

    Args:
        model: the whole model.
        rows: the batch.
        cache: its keys and values, in the order of the rows.
        size: tokens of a block.
    """

    def __init__(self, model: Any, rows: Rows, cache: BardVLCache, size: int):
        self.model, self.rows, self.cache, self.size = model, rows, cache, size
        self.attention: Any = attention_of(model.config.text_config)
        self.device = rows.ids.device

    @property
    def num_rows(self) -> int:
        """Rows of the cache."""
        return self.rows.spare

    def repeat_rows(self, times: int) -> None:
        """Go on with every row `times` times, next to itself."""
        self.rows = self.rows.repeated(times)

    def encode(
        self, blocks: list[tuple[int, int, int]], features: VisualFeatures | None = None, layers: Any = None
    ) -> torch.Tensor:
        """Encode slots, each (row, first column, columns): (tokens, hidden) states after the last norm.

        Args:
            blocks: slots, of which each ends where a block ends.
            features: visual features, for slots of prompts.
            layers: the text layers' arithmetic, where it is not the modules'.
        """
        numbers, firsts, counts = (list(column) for column in zip(*blocks, strict=True))
        ends = [first + count for first, count in zip(firsts, counts, strict=True)]
        slots = Slots.of(numbers, counts, ends, self.device)
        # By the table of slots on the device alone: one copy from the host a forward.
        slot = torch.repeat_interleave(slots.count, output_size=sum(counts))
        row = slots.row[slot].long()
        column = (slots.length - slots.count - slots.begin)[slot] + torch.arange(len(slot), device=self.device)
        writing = Writing(row, column, self.num_rows, max(ends), self.rows.num_columns)
        if layers is not None:
            embeds = self.model.get_input_embeddings()(self.rows.ids[row, column])[None]
            with self.cache.writing(writing):
                return layers.run(embeds, self.rows.positions[:, row, column][:, None], self.cache.layers, slots)[0]
        return self._run(row[None], column[None], writing, None, features, slots=slots)[0]

    def encode_side_by_side(
        self, numbers: list[int], firsts: list[int], widths: list[int], features: VisualFeatures | None = None
    ) -> torch.Tensor:
        """Encode a window of each row under a mask, for stock attention: (tokens, hidden) states as `encode`'s.

        Shorter windows run on into columns that are encoded again before they are seen.
        """
        width, device = max(widths), self.device
        row, first = torch.tensor([numbers, firsts], device=device)
        column = first[:, None] + torch.arange(width, device=device)
        end = max(firsts) + width
        everyone = numbers == list(range(self.num_rows))
        writing = Writing(
            row.repeat_interleave(width), column.flatten(), self.num_rows, end, self.rows.num_columns,
            slice(self.num_rows) if everyone else row,
        )  # fmt: skip
        seen = self.block_ends(row, column)
        visible = torch.arange(end, device=device) < seen[..., None]
        hidden = self._run(row[:, None].expand_as(column), column, writing, visible, features)
        wanted = torch.arange(width, device=device) < torch.tensor(widths, device=device)[:, None]
        return hidden[wanted.to(hidden.device)]

    def block_ends(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """(n, width) the column behind the block of each of the columns (n, width) of rows (n,).

        A prompt is cut from column 0, its last block may be short; a response from the prompt's end.
        """
        length, size = self.rows.length[row][:, None], self.size
        in_prompt = torch.minimum((column // size + 1) * size, length)
        return torch.where(column < length, in_prompt, length + ((column - length) // size + 1) * size)

    def blocks(self, row: int, length: int, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The blocks of a row with a prompt of `length` tokens, from column `first`, where one begins, up to `end`."""
        while first < end:
            behind = length if first < length else end
            count = min(self.size, behind - first)
            yield row, first, count
            first += count

    def encode_spans(
        self, spans: list[tuple[int, int, int, int]], features: VisualFeatures | None = None
    ) -> torch.Tensor:
        """Encode (row, prompt length, first column, end) of whole blocks: (tokens, hidden), in this order."""
        if self.attention != ATTENTION_NAME:
            numbers, _, firsts, ends = (list(column) for column in zip(*spans, strict=True))
            widths = [end - first for first, end in zip(firsts, ends, strict=True)]
            return self.encode_side_by_side(numbers, firsts, widths, features)
        return self.encode([block for span in spans for block in self.blocks(*span)], features)

    def encode_prompts(
        self, prompt: Prompt, first: int, behind: int | list[int], chunk: int | None = None
    ) -> tuple[torch.Tensor, int]:
        """Encode every row's prompt from column `first` on, images included, and `behind` columns behind it.

        `behind` is a number for all rows, or one for each. With `chunk`, in forwards of `chunk` columns; the
        last one takes what is behind the prompts along.

        Returns:
            (rows, block, hidden) hidden states of the last of these columns, a block at most, and the number of
            forwards.
        """
        behind = behind if isinstance(behind, list) else [behind] * len(prompt.host_lengths)
        features = self.model.model.encode_visual(prompt.input_ids, prompt.visual_inputs, first)
        lengths, num_forwards = prompt.host_lengths, 1
        while chunk is not None and max(lengths) - first > chunk:
            spans = [(row, n, first, min(first + chunk, n)) for row, n in enumerate(lengths) if n > first]
            self.encode_spans(spans, features)
            first, num_forwards = first + chunk, num_forwards + 1
        # A row whose prompt has ended in an earlier chunk takes part with what is behind it alone.
        columns = enumerate(zip(lengths, behind, strict=True))
        spans = [(row, n, min(first, n), n + more) for row, (n, more) in columns]
        hidden = self.encode_spans(spans, features)
        ends = torch.tensor([end - start for _, _, start, end in spans]).cumsum(0)[:, None]
        width = min(self.size, *behind)
        wanted = (ends - width + torch.arange(width)).to(hidden.device)
        return hidden[wanted], num_forwards

    def encode_masked_copies(self, answer_positions: torch.Tensor, block_size: int, mask_token_id: int) -> torch.Tensor:
        """Hidden state of every answer token masked alone in a copy of its block: (rows, positions, hidden).

        The copies are side by side behind the cached columns and leave nothing there. A copy sees the blocks before its
        own, and itself.
        """
        rows, device = self.rows, answer_positions.device
        row, length = torch.arange(self.num_rows, device=device)[:, None], rows.length[: self.num_rows, None]
        start = answer_positions // block_size * block_size
        source = length + (start[:, None] + torch.arange(block_size, device=device)).flatten()
        masked = torch.arange(len(answer_positions), device=device) * block_size + answer_positions - start
        copy = torch.arange(len(answer_positions), device=device).repeat_interleave(block_size)
        end = int((length + start).max())
        before = torch.arange(end, device=device) < (length + start[copy])[..., None]
        own = (copy[:, None] == copy[None]).expand(self.num_rows, -1, -1)
        ids = rows.ids[row, source].index_fill(1, masked, mask_token_id)
        writing = Writing(source, source, self.num_rows, end, end, is_kept=False)
        return self._encode(ids, rows.positions[:, row, source], writing, torch.cat([before, own], -1))[:, masked]

    def _run(
        self,
        row: torch.Tensor,
        column: torch.Tensor,
        writing: Writing,
        visible: torch.Tensor | None,
        features: VisualFeatures | None,
        **attention: Any,
    ) -> torch.Tensor:
        if features is not None:
            padded = torch.nn.functional.pad(features.index, [0, self.rows.num_columns], value=-1)
            features = replace(features, index=padded[row, column])
        ids, positions = self.rows.ids[row, column], self.rows.positions[:, row, column]
        return self._encode(ids, positions, writing, visible, features, **attention)

    def _encode(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        writing: Writing,
        visible: torch.Tensor | None,
        features: VisualFeatures | None = None,
        **attention: Any,
    ) -> torch.Tensor:
        """One forward of the language model: (n, width, hidden) states after the last norm.

        Args:
            ids: (n, width); positions: (3, n, width).
            writing: where the keys and values go.
            visible: (n, width, keys) what each token sees, where the attention is not told by slots.
            features: visual features, their index that of the (n, width) tokens.
            attention: further arguments of `block_attention`.
        """
        text_model = self.model.model.language_model
        embeds = text_model.embed_tokens(ids)
        if features is not None:
            embeds, deepstack = features.show(embeds)
            attention |= deepstack
        mask = None if visible is None else to_attention_mask(visible, self.attention, embeds.dtype)
        with self.cache.writing(writing):
            return encode_text(text_model, embeds, mask, positions, self.cache, use_cache=True, **attention)[0]


@dataclass
class Progress:
    """The progress of each row, as the host has last read it.

    Attributes:
        lengths, limits: prompt tokens, and response tokens at most.
        starts: first column of each row's block.
        running: rows that have not ended.
        carrying: of those that carry any, finished blocks in front of the row's block that are not encoded yet.
    """

    lengths: list[int]
    limits: list[int]
    starts: list[int]
    running: list[int]
    carrying: dict[int, int]

    @classmethod
    def of(cls, lengths: list[int], limits: list[int], copies: int) -> "Progress":
        """Of prompts, each of which becomes `copies` rows once it is encoded."""
        return cls(list(lengths), list(limits), list(lengths), list(range(len(lengths) * copies)), {})

    def repeat(self, copies: int) -> None:
        """From prompts to rows."""
        for numbers in (self.lengths, self.limits, self.starts):
            numbers[:] = [number for number in numbers for _ in range(copies)]


class Engine:
    """One call of `generate`: a batch from prompts to responses.

    The rows' state is on the device. The host reads after each step which rows ended or moved on; one step late if
    steps are recorded and no caller follows them.

    Args:
        model: the whole model.
        prompt: realigned.
        limits: most response tokens of each prompt.
        settings, cache, hooks: of the call.
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
        self.denoiser = Denoiser(settings, self.device)
        size = settings.block_size
        # One spare block: slots without a row, or without a block of their own, write there.
        num_columns = max(prompt.host_lengths) + (-(-settings.max_new_tokens // size) + 1) * size
        self.layers = layers_of(model, settings)
        if self.is_recorded:
            num_columns = -(-num_columns // COLUMNS) * COLUMNS
        self.rows = Rows.lay_out(prompt, limits, size, settings.mask_token_id, num_columns)
        self.encoder = SlotEncoder(model, self.rows, cache, size)
        self.progress = Progress.of(prompt.host_lengths, limits, settings.num_return_sequences)
        self.history: list[list[DenoisingStep]] = [[] for _ in self.progress.running]
        self.num_forwards: Counter[str] = Counter()

    @property
    def device(self) -> torch.device:
        """That of the prompts and of the rows."""
        return self.prompt.input_ids.device

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed: the caller's processors run on the host, and a form skips what it dictates."""
        is_fixed = not self.hooks.processors and self.hooks.form is None
        return self.layers is not None and self.device.type in DEVICES and is_fixed

    def run(self, reused: int) -> None:
        """Decode, with the columns before `reused` from the cache."""
        with self._recording() as recorded:
            self._prefill(reused, recorded)
            if recorded is None:
                while self.progress.running:
                    self._step()
            else:
                self._replay(recorded)

    @contextmanager
    def _recording(self) -> Iterator[Recording | None]:
        if not self.is_recorded or self.layers is None:
            yield None
            return
        shape = (len(self.progress.running), self.rows.num_columns)
        with recording(self.model, self.layers, self.denoiser, shape, self.hooks.own_processors) as lent:
            yield lent

    def _prefill(self, reused: int, recorded: Recording | None) -> None:
        """Encode the prompts from column `reused` on, the last of them together with every first block's first step."""
        progress, size, copies = self.progress, self.settings.block_size, self.settings.num_return_sequences
        if recorded is not None and copies == 1:
            self.cache.lend(recorded.buffers)
        if self.hooks.form is not None:
            self._begin_forms(self.hooks.form)
        behind = [start + size - length for start, length in zip(progress.starts, progress.lengths, strict=True)]
        chunk = self.settings.prefill_chunk_size
        hidden, num_forwards = self.encoder.encode_prompts(self.prompt, reused, behind, chunk)
        if num_forwards > 1:
            self.num_forwards["prefill"] += num_forwards - 1
        self.num_forwards["prefill+denoise" if max(progress.lengths) > reused else "denoise"] += 1
        if copies > 1:
            self.cache.repeat_rows(copies)
            self.encoder.repeat_rows(copies)
            self.rows = self.encoder.rows
            progress.repeat(copies)
            hidden = hidden.repeat_interleave(copies, dim=0)
            if recorded is not None:
                self.cache.lend(recorded.buffers)
        self._advance(hidden)

    def _replay(self, recorded: Recording) -> None:
        """Decode by recorded steps; where callers look at them, the host reads each before it launches the next."""
        own = self.rows
        recorded.start(own, self.hooks.generator)
        if self.hooks.any:
            self.rows = recorded.rows
            while self.progress.running:
                self._count_step()
                self._follow(*recorded.next_step(len(self.progress.running), len(self.progress.carrying)))
            self.rows = own
        else:
            self.num_forwards += recorded.run(len(self.progress.running), len(self.progress.carrying))
        own.copy_from(recorded.rows)

    def _count_step(self) -> None:
        self.num_forwards["commit+denoise" if self.progress.carrying else "denoise"] += 1

    def _step(self) -> None:
        """Encode every running row's block, finished blocks in front of it together with it, and decide."""
        self._count_step()
        size, starts, running = self.settings.block_size, self.progress.starts, self.progress.running
        carried = {row: range(-self.progress.carrying.get(row, 0), 0) for row in running}
        ahead = {row: range(1, 1 + self._num_ahead(row)) for row in running}
        lanes = [(row, place) for row in running for place in carried[row]]
        num_carried = len(lanes)
        lanes += [(row, 0) for row in running]
        lanes += [(row, place) for row in running for place in ahead[row]]
        if self.encoder.attention == ATTENTION_NAME:
            blocks = [(row, starts[row] + size * place, size) for row, place in lanes]
            hidden = self.encoder.encode(blocks, layers=self.layers).unflatten(0, (-1, size))
        else:
            firsts = [starts[row] - size * len(carried[row]) for row in running]
            widths = [size * (len(carried[row]) + 1 + len(ahead[row])) for row in running]
            hidden = self.encoder.encode_side_by_side(running, firsts, widths).unflatten(0, (-1, size))
            order = sorted(range(len(lanes)), key=lanes.__getitem__)
            hidden = hidden[torch.tensor(order, device=hidden.device).argsort()]
        hidden = hidden[num_carried:]
        if len(hidden) > len(running):
            self._look_ahead(lanes[num_carried + len(running) :], hidden[len(running) :])
        self._advance(hidden[: len(running)])

    def _num_ahead(self, row: int) -> int:
        """Blocks behind a row's own that are denoised together with it."""
        progress, size = self.progress, self.settings.block_size
        room = progress.limits[row] - (progress.starts[row] - progress.lengths[row])
        return min(self.settings.concurrent_blocks, -(-room // size)) - 1

    def _look_ahead(self, lanes: list[tuple[int, int]], hidden: torch.Tensor) -> None:
        """Decide in the blocks `lanes` (row, blocks ahead of its own) by (lanes, block, hidden) states."""
        owner, ahead = torch.tensor(lanes, device=self.device).unbind(-1)
        logits = self.model.lm_head(hidden).to(self.device)
        self.denoiser.decide_ahead(self.rows, owner, ahead, logits, self.hooks.generator)

    def _advance(self, hidden: torch.Tensor) -> None:
        """Decide by (running rows, block, hidden) states."""
        owner = torch.tensor(self.progress.running, device=self.device)
        choice = self._choose(owner, hidden)
        self._follow(self.denoiser.decide(self.rows, owner, choice, self.hooks.form), choice.confidence)

    def _choose(self, owner: torch.Tensor, hidden: torch.Tensor) -> Choice:
        settings, hooks, lm_head = self.settings, self.hooks, self.model.lm_head
        processed = hooks.own_processors or hooks.processors
        all_matter = settings.revision or settings.samples or processed or hooks.keep_history or self.hooks.form
        if all_matter or {hidden.device.type, self.device.type} != {"cpu"}:
            logits = lm_head(hidden).to(self.device)
            then = self._process_logits if hooks.processors else None
            return self.denoiser.choose(
                self.rows, owner, logits, hooks.generator, hooks.own_processors, then, self.hooks.form
            )
        return self.denoiser.choose_undecided(self.rows, owner, hidden, lm_head)

    def _follow(self, decision: Decision, confidence: torch.Tensor) -> None:
        """Show what a step decided to those who want to see it, and read where the running rows are."""
        self._report(decision, confidence)
        progress, rows, form = self.progress, self.rows, self.hooks.form
        if self.hooks.watch_blocks:
            for row, is_finished in zip(progress.running, decision.finished.tolist(), strict=True):
                if is_finished:
                    start = progress.starts[row]
                    self._show_block(row, start, int(rows.response_length[row]), start)
        owner = torch.tensor(progress.running, device=self.device)
        state = [rows.start[owner], rows.ended[owner].long(), rows.carries[owner].long(), rows.form_state[owner]]
        running, progress.running, progress.carrying = progress.running, [], {}
        for row, start, has_ended, carries, form_state in zip(running, *torch.stack(state).tolist(), strict=True):
            progress.starts[row] = start
            if has_ended:
                continue
            if carries:
                progress.carrying[row] = 1
                if form is not None and self._dictate(form, row, form_state):
                    del progress.carrying[row]
                    continue
            progress.running.append(row)
        if form is not None and progress.carrying:
            self.denoiser.dictate(rows, torch.tensor([*progress.carrying], device=self.device), form)

    # --- what a form dictates --------------------------------------------------------------------------------------

    def _begin_forms(self, form: BlockForm) -> None:
        """Put every row's form in front of its first block, and write what it dictates."""
        rows, owner = self.rows, torch.arange(self.rows.spare, device=self.device)
        rows.form_state[:-1] = torch.tensor(form.starts, device=self.device)
        for row, state in enumerate(form.starts):
            self._dictate(form, row, state, is_first=True)
        self.denoiser.dictate(rows, owner, form)

    def _dictate(self, form: BlockForm, row: int, state: int, is_first: bool = False) -> bool:
        """Write what a row's form dictates from its block on, whole blocks without a step; is it the end?

        The first blocks are encoded with the prompt, and a last one among them takes a step: something must.
        """
        rows, progress, size = self.rows, self.progress, self.settings.block_size
        start, length = progress.starts[row], progress.lengths[row]
        offset, first = start - length, start - size * progress.carrying.get(row, 0)
        room = progress.limits[row] - offset
        tokens, states = form.dictated(state, room)
        if not tokens:
            return False
        ends = tokens[-1] == form.eos or len(tokens) == room
        num_whole = (len(tokens) - ends) // size
        if is_first and self.hooks.may_stop:
            num_whole = 0
        place = slice(start, start + len(tokens))
        rows.ids[row, place] = torch.tensor(tokens, device=self.device)
        rows.confidences[row, place], rows.dictated[row, place] = 1.0, True
        if self.hooks.keep_history:
            blocks = (tokens + [form.eos] * (-len(tokens) % size))[: (num_whole + (ends and not is_first)) * size]
            self._keep_dictated(row, offset // size, torch.tensor(blocks, dtype=torch.long).view(-1, size), is_first)
        if self.hooks.watch_blocks:
            for number in range(num_whole + (ends and not is_first)):
                begin = start + number * size
                if self._show_block(row, begin, min(begin - length + size, offset + len(tokens)), first):
                    return True
        if ends and not is_first:
            rows.response_length[row] = offset + len(tokens)
            rows.ended[row], rows.carries[row], rows.start[row] = True, False, first
            return True
        if num_whole:
            progress.starts[row] += num_whole * size
            rows.start[row], rows.form_state[row] = progress.starts[row], states[num_whole * size - 1]
            rows.response_length[row] = offset + num_whole * size
            if not is_first:
                progress.carrying[row] += num_whole
        return False

    def _keep_dictated(self, row: int, block: int, ids: torch.Tensor, is_first: bool) -> None:
        """Add dictated blocks (n, block size) to the history, those behind a prompt to that of each of its answers."""
        copies = self.settings.num_return_sequences if is_first else 1
        everywhere = torch.ones(ids.shape[1], dtype=torch.bool)
        for number, own in enumerate(ids):
            step = DenoisingStep(block + number, own, everywhere, ~everywhere, everywhere.float(), own)
            for copy in range(copies):
                self.history[row * copies + copy].append(step)

    def _process_logits(self, logits: torch.Tensor, first: int) -> torch.Tensor:
        """Run the caller's processors at every undecided position with the committed tokens left of it.

        The logits (rows, n, vocabulary) are those of `n` positions of each row's block, from index `first` on.
        """
        mask_token_id = self.settings.mask_token_id
        for place, row in enumerate(self.progress.running):
            start = self.progress.starts[row] + first
            block = self.rows.ids[row, start : start + logits.shape[1]]
            for offset in (block == mask_token_id).nonzero()[:, 0].tolist():
                left = self.rows.ids[row, : start + offset]
                left = left[left != mask_token_id]
                logits[place, offset] = self.hooks.processors(left[None], logits[place, offset][None])[0]
        return logits

    def _report(self, decision: Decision, confidence: torch.Tensor) -> None:
        """Hand a draft to the streamer and keep the history, if asked."""
        if hasattr(self.hooks.streamer, "put_draft"):
            self.hooks.streamer.put_draft(value=decision.ids.cpu())
        if self.hooks.keep_history:
            parts = (decision.ids, decision.committed, decision.revised, confidence, decision.chosen)
            for row, *step in zip(self.progress.running, *(part.cpu() for part in parts), strict=True):
                index = (self.progress.starts[row] - self.progress.lengths[row]) // self.settings.block_size
                kept = DenoisingStep(index, *step)
                if index not in {other.block for other in self.history[row][-1:]}:
                    kept.committed = kept.ids != self.settings.mask_token_id
                self.history[row].append(kept)

    def _show_block(self, row: int, start: int, length: int, first: int) -> bool:
        """Show a finished block to the stopping criteria, prefix by prefix, and to the streamer; does it stop the row?

        Args:
            row: its row.
            start: its first column.
            length: tokens of the response up to its end.
            first: first column of the blocks that are not yet encoded: there the cache ends if the row does.
        """
        rows, offset = self.rows, start - self.progress.lengths[row]
        kept = length - offset
        stopped = time.monotonic() > self.hooks.deadline
        for count in range(1, kept + 1) if self.hooks.criteria else ():
            if bool(self.hooks.criteria(rows.ids[row, : start + count][None], None).all()):
                kept, stopped = count, True
                break
        if self.hooks.streamer is not None:
            self.hooks.streamer.put(rows.ids[row, start : start + kept].cpu())
        if stopped:
            rows.response_length[row] = offset + kept
            rows.ended[row], rows.carries[row], rows.start[row] = True, False, first
        return stopped

    # --- what comes out --------------------------------------------------------------------------------------------

    def responses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Response ids (rows, longest) padded on the right, and the confidence of each token, 0 for padding."""
        rows, own = self.rows, slice(self.rows.spare)
        length = rows.response_length[own, None]
        columns = torch.arange(int(length.max()), device=self.device)
        cell = (torch.arange(rows.spare, device=self.device)[:, None], rows.length[own, None] + columns)
        padding = columns >= length
        ids = rows.ids[cell].masked_fill(padding, self.settings.pad_token_id)
        return ids, rows.confidences[cell].masked_fill(padding, 0.0)

    def dictated(self) -> torch.Tensor:
        """(rows, longest) bool, response tokens to which the row's form left no alternative."""
        rows, own = self.rows, slice(self.rows.spare)
        length = rows.response_length[own, None]
        columns = torch.arange(int(length.max()), device=self.device)
        row = torch.arange(rows.spare, device=self.device)[:, None]
        return rows.dictated[row, rows.length[own, None] + columns] & (columns < length)

    def tokens_per_forward(self) -> torch.Tensor:
        """(rows,) response tokens over forwards: the row's steps, and those of its prompt that held no step."""
        own = slice(self.rows.spare)
        num_forwards = self.rows.steps[own].sum(-1) + self.num_forwards["prefill"]
        return (self.rows.response_length[own].float() / num_forwards).cpu()

    def step_counts(self) -> torch.Tensor:
        """(rows, blocks) steps of each block, 0 where a row has no such block, or its form dictated it."""
        own = slice(self.rows.spare)
        num_blocks = -(-int(self.rows.response_length[own].max()) // self.settings.block_size)
        return self.rows.steps[own, :num_blocks].cpu()

    def reference_statistics(self) -> dict[str, Any]:
        """The reference's `return_step_stats`, with tokens counted to the first EOS."""
        counts = self.step_counts()
        tokens, steps = int(self.rows.response_length[: self.rows.spare].sum()), int(counts.sum())
        return {
            "block_step_counts": counts,
            "num_response_tokens": tokens,
            "num_denoising_steps": steps,
            "tpf": tokens / steps,
        }

    def encoded_contents(self, contents: list[torch.Tensor]) -> list[torch.Tensor]:
        """The cached part of each row in the partition of a later prompt, which is cut from position 0.

        A response's blocks begin where its prompt ended: only behind a prompt of whole blocks they fit that partition.
        """
        encoded = []
        for row, (length, committed) in enumerate(zip(self.progress.lengths, self.rows.start.tolist(), strict=False)):
            known = contents[row // self.settings.num_return_sequences]
            whole = length // self.settings.block_size * self.settings.block_size
            if whole == length:
                known = torch.cat([known, self.rows.ids[row, length:committed].cpu()])
                whole = committed
            encoded.append(known[:whole])
        return encoded


__all__ = ["DenoisingStep", "Engine", "SlotEncoder"]
