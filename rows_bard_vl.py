"""The rows of a batch while they are decoded: a table of tokens, where each row is in it, and what a step decides.

Everything is on the device and by row. The last row is a spare one that never runs; slots without a row refer to it.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from .generation_config_bard_vl import DecodingSettings
from .inputs_bard_vl import Prompt
from .processors_bard_vl import TokenProcessors
from .remasking_bard_vl import REMASKING_RULES, Choice, Chooser, in_order, overwritten, remasked, transfer_schedule
from .structured_bard_vl import BlockForm, Place


@dataclass
class Rows:
    """State of a batch. Every row of the table starts at column 0: its prompt, its response, room to spare.

    Attributes:
        ids: (rows + 1, columns), the mask id where undecided.
        positions: (3, rows + 1, columns) temporal, height and width.
        length, limit: (rows + 1,) prompt tokens, and response tokens at most.
        start: (rows + 1,) first column of the block that is being denoised.
        steps: (rows + 1, blocks) denoising steps of each block of the response.
        carries: (rows + 1,) bool, the block in front is finished and its keys and values are not yet encoded.
        ended: (rows + 1,) bool.
        response_length: (rows + 1,) tokens of a response that has ended, or up to its last finished block.
        confidences: (rows + 1, columns) of committed tokens.
        form_state: (rows + 1,) state of the row's form in front of the block, 0 without a form.
        dictated: (rows + 1, columns) bool, tokens to which the row's form left no alternative.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    length: torch.Tensor
    limit: torch.Tensor
    start: torch.Tensor
    steps: torch.Tensor
    carries: torch.Tensor
    ended: torch.Tensor
    response_length: torch.Tensor
    confidences: torch.Tensor
    form_state: torch.Tensor
    dictated: torch.Tensor

    @classmethod
    def lay_out(
        cls, prompt: Prompt, limits: list[int], block_size: int, mask_token_id: int, num_columns: int
    ) -> "Rows":
        """Lay prompts out, with undecided tokens behind each."""
        device = prompt.input_ids.device
        longest = prompt.input_ids.shape[1]
        columns, pad = torch.arange(num_columns, device=device), [0, num_columns - longest]
        behind = columns - prompt.lengths[:, None]
        ids = torch.nn.functional.pad(prompt.input_ids, pad).masked_fill_(behind >= 0, mask_token_id)
        known = torch.nn.functional.pad(prompt.positions, pad)
        positions = torch.where(behind < 0, known, prompt.next_position[:, None] + behind)
        table = (ids, positions, prompt.lengths, torch.tensor(limits, device=device))
        ids, positions, length, limit = (_with_spare(each, dim) for each, dim in zip(table, (0, 1, 0, 0), strict=True))
        length[-1] = num_columns - block_size
        ended = torch.zeros_like(length, dtype=torch.bool)
        ended[-1] = True
        return cls(
            ids=ids,
            positions=positions,
            length=length,
            limit=limit,
            start=length.clone(),
            steps=ids.new_zeros(len(ids), num_columns // block_size),
            carries=torch.zeros_like(ended),
            ended=ended,
            response_length=torch.zeros_like(length),
            confidences=torch.zeros(ids.shape, dtype=torch.float32, device=device),
            form_state=torch.zeros_like(length),
            dictated=torch.zeros(ids.shape, dtype=torch.bool, device=device),
        )

    @property
    def spare(self) -> int:
        """The number of the spare row, and of the others."""
        return len(self.length) - 1

    @property
    def num_columns(self) -> int:
        """Columns of the table."""
        return self.ids.shape[1]

    def repeated(self, times: int) -> "Rows":
        """Every row `times` times, next to each other."""
        order = torch.arange(self.spare, device=self.ids.device).repeat_interleave(times)
        order = torch.nn.functional.pad(order, [0, 1], value=self.spare)
        dims = {each.name: int(each.name == "positions") for each in fields(self)}
        return Rows(**{name: getattr(self, name).index_select(dim, order) for name, dim in dims.items()})

    def copy_from(self, other: "Rows") -> None:
        """Take over the state of another of the same shape, in place."""
        for each in fields(self):
            getattr(self, each.name).copy_(getattr(other, each.name))

    def cells(self, owner: torch.Tensor, size: int, ahead: torch.Tensor | int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the block of `size` tokens that each of the rows `owner` (n,) denoises, or one `ahead` of it."""
        first = self.start[owner] + size * ahead
        return owner[:, None], first[:, None] + torch.arange(size, device=owner.device)


def _with_spare(states: torch.Tensor, dim: int) -> torch.Tensor:
    """With a row of zeros behind the others."""
    return torch.nn.functional.pad(states, [0, 0] * (states.ndim - 1 - dim) + [0, 1])


@dataclass
class Decision:
    """The changes of a step in the blocks of n rows.

    Attributes:
        ids: (n, block) after it.
        committed, revised: (n, block) bool.
        finished, running: (n,) bool; rows that had ended before do not run.
        chosen: (n, block) what each undecided position would have taken.
    """

    ids: torch.Tensor
    committed: torch.Tensor
    revised: torch.Tensor
    finished: torch.Tensor
    running: torch.Tensor
    chosen: torch.Tensor


class Denoiser:
    """Chooses tokens by logits and commits them: what the settings say, and no state."""

    def __init__(self, settings: DecodingSettings, device: torch.device):
        self.settings, self.size = settings, settings.block_size
        self.schedule = transfer_schedule(self.size, settings.denoising_steps).to(device)
        self.eos = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=device)
        self.rule = REMASKING_RULES[settings.remasking_strategy]
        self.chooser = Chooser(
            settings.mask_token_id,
            settings.sampling,
            self.rule.measure,
            keeps_present=settings.remasks,
        )

    def choose(
        self,
        rows: Rows,
        owner: torch.Tensor,
        logits: torch.Tensor,
        generator: torch.Generator | None = None,
        processors: TokenProcessors | None = None,
        then: Any = None,
        form: BlockForm | None = None,
    ) -> Choice:
        """Choose a token for every position of (n, block, vocabulary) logits; see `TokenProcessors.choose`.

        With a form, the best completion within it by what the processors leave of the logits.
        """
        if form is not None:
            _, columns = rows.cells(owner, self.size)
            scores = logits.float() if processors is None else processors.process(logits, rows.ids[owner], columns)
            scores = scores if then is None else then(scores, 0)
            held, place = rows.ids[rows.cells(owner, self.size)], self.place(rows, owner)
            return form.choose(scores, held, place, self.chooser, generator, self.settings.overwrite_threshold)
        if processors is not None:
            return processors.choose(logits, rows.ids[owner], rows.start[owner], self.chooser, generator, then)
        logits = logits if then is None else then(logits.float(), 0)
        return self.chooser.choose(logits, rows.ids[rows.cells(owner, self.size)], generator)

    def choose_undecided(self, rows: Rows, owner: torch.Tensor, hidden: torch.Tensor, lm_head: Any) -> Choice:
        """The same greedily by (n, block, hidden) states, of which only undecided positions are projected.

        The others get zeros: nothing may need them. On a GPU counting the undecided ones would force a sync.
        """
        held = rows.ids[rows.cells(owner, self.size)]
        undecided = held == self.settings.mask_token_id
        logits = lm_head(hidden[undecided]).to(held.device)  # `device_map` may have the head elsewhere
        choice = self.chooser.choose(logits[None], held[undecided][None])
        ids, confidence, measure = (part.new_zeros(held.shape).masked_scatter(undecided, part) for part in choice[:3])
        return Choice(ids, confidence, measure, present=None)

    def place(self, rows: Rows, owner: torch.Tensor) -> Place:
        """The progress of the rows `owner` (n,) in their forms, at the start of their blocks."""
        ahead = rows.limit[owner] - (rows.start[owner] - rows.length[owner])
        return Place(rows.form_state[owner], ahead.clamp(max=self.size), ahead - self.size)

    def dictate(self, rows: Rows, owner: torch.Tensor, form: BlockForm) -> torch.Tensor:
        """Commit what the form dictates in the blocks of the rows `owner` (n,), in place: (n, block) bool, where."""
        cell = rows.cells(owner, self.size)
        dictated, ids = form.dictates(rows.ids[cell], self.place(rows, owner), self.settings.mask_token_id)
        dictated = dictated & ~rows.ended[owner, None]
        rows.ids[cell] = torch.where(dictated, ids, rows.ids[cell])
        rows.confidences[cell] = rows.confidences[cell].masked_fill(dictated, 1.0)
        rows.dictated[cell] |= dictated
        return dictated

    def decide(self, rows: Rows, owner: torch.Tensor, choice: Choice, form: BlockForm | None = None) -> Decision:
        """Commit tokens in the blocks of the rows `owner` (n,), and move the rows on, in place.

        Tokens that the form then dictates are committed with them.
        """
        settings, size, cell = self.settings, self.size, rows.cells(owner, self.size)
        offset = rows.start[owner] - rows.length[owner]
        step = (owner, offset // size)
        block, running = rows.ids[cell], ~rows.ended[owner]
        masked = (block == settings.mask_token_id) & running[:, None]
        is_last = rows.steps[step] >= len(self.schedule) - 1
        quota = torch.where(is_last, size, self.schedule[rows.steps[step].clamp(max=len(self.schedule) - 1)])
        commit = self.rule.commit(choice.measure, masked, quota, settings.bound)
        if choice.reads is not None:
            commit = in_order(commit, masked, quota, choice.reads)
        revised = self._revise(block, ~masked & running[:, None], is_last, choice)
        again = revised & settings.remasks
        block = torch.where(commit | revised, choice.ids, block).masked_fill(again, settings.mask_token_id)
        rows.ids[cell] = block
        rows.confidences[cell] = torch.where(commit | revised, choice.confidence, rows.confidences[cell])
        rows.steps[step] += running
        if form is not None:
            rows.dictated[cell] &= ~again
            commit = commit | self.dictate(rows, owner, form)
            block = rows.ids[cell]

        length, ends = self._response_end(block, offset, rows.limit[owner])
        decided = block != settings.mask_token_id
        if settings.end_at_first_eos:
            decided |= offset[:, None] + torch.arange(size, device=block.device) >= length[:, None]
        finished = running & decided.all(-1)
        rows.response_length[owner] = torch.where(finished, length, rows.response_length[owner])
        if choice.form_state is not None:
            rows.form_state[owner] = torch.where(finished, choice.form_state, rows.form_state[owner])
        rows.ended[owner] |= finished & ends
        rows.carries[owner] = finished & ~ends
        rows.start[owner] += size * (finished & ~ends)
        return Decision(block, commit, revised, finished, running, choice.ids)

    def decide_ahead(
        self,
        rows: Rows,
        owner: torch.Tensor,
        ahead: torch.Tensor,
        logits: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> None:
        """Commit, in place, what is sure enough already in blocks further on; the schedule waits for their own steps.

        Args:
            rows: the batch, not yet moved on by this step.
            owner: (n,) rows.
            ahead: (n,) blocks between the row's own and the one meant, at least 1; anything for the spare row.
            logits: (n, block, vocabulary).
            generator: of samples.
        """
        cell = rows.cells(owner, self.size, torch.where(owner == rows.spare, 0, ahead))
        held = rows.ids[cell]
        choice = self.chooser.choose(logits, held, generator)
        masked = (held == self.settings.mask_token_id) & ~rows.ended[owner, None]
        commit = self.rule.commit(choice.measure, masked, torch.zeros_like(owner), self.settings.bound)
        rows.ids[cell] = torch.where(commit, choice.ids, held)
        rows.confidences[cell] = torch.where(commit, choice.confidence, rows.confidences[cell])

    def _revise(
        self, block: torch.Tensor, visible: torch.Tensor, is_last: torch.Tensor, choice: Choice
    ) -> torch.Tensor:
        """(n, block) visible positions that change; none is masked again at a block's last step."""
        revision = self.settings.revision
        if revision is None:
            return torch.zeros_like(visible)
        if choice.present is not None:
            return remasked(choice.present, visible & ~is_last[:, None], revision.threshold)
        return overwritten(block, visible, choice.ids, choice.confidence, revision.threshold)

    def _response_end(
        self, block: torch.Tensor, offset: torch.Tensor, limit: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Response tokens up to the end of each block (n, block), EOS and limit heeded; is it the end?"""
        room = (limit - offset).clamp(max=self.size)
        place = torch.arange(self.size, device=block.device)
        is_eos = torch.isin(block, self.eos) & (place < room[:, None])
        kept = torch.where(is_eos.any(-1), is_eos.long().argmax(-1) + 1, room)
        length = offset + kept
        return length, is_eos.any(-1) | (length == limit)


__all__ = ["Decision", "Denoiser", "Rows"]
