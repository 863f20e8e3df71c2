"""The blocks that requests denoise, and what a step decides: the package's own rules. Nothing here imports vLLM."""

from collections.abc import Iterator
from itertools import groupby
from typing import cast

import numpy as np
import torch

from ...generation_config_bard_vl import DecodingSettings
from ...remasking_bard_vl import REMASKING_RULES, pick_tokens, probability_of, transfer_schedule

TILE = 2**30  # bytes of float32 logits that are worked on together


class Blocks:
    """One block of each of `num_slots` requests, on the device; every request has settings of its own.

    Args:
        num_slots: requests at most.
        block_size: tokens per block.
        mask_token_id: stands for an undecided token.
        device: of the logits.

    Attributes:
        ids: (slots, block).
        step: (slots,) steps that the block has taken.
    """

    def __init__(self, num_slots: int, block_size: int, mask_token_id: int, device: torch.device):
        self.size, self.mask_token_id, self.device = block_size, mask_token_id, device
        self.ids = torch.full((num_slots, block_size), mask_token_id, device=device)
        self.step = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.num_steps = torch.full((num_slots,), block_size, device=device)
        self.bound = torch.zeros(num_slots, 1, device=device)
        self.quotas = quotas(block_size).to(device)
        self.settings: dict[int, DecodingSettings] = {}  # by slot, on the host
        self.generators: dict[int, torch.Generator] = {}

    def begin(self, slot: int, settings: DecodingSettings, seed: int) -> None:
        """An empty block for a request; `seed` is that of its randomness, if its settings sample."""
        self.settings[slot] = settings
        self.ids[slot], self.step[slot] = self.mask_token_id, 0
        self.num_steps[slot] = settings.denoising_steps
        self.bound[slot] = settings.bound
        if settings.samples:
            self.generators[slot] = torch.Generator(device=self.device).manual_seed(seed)

    def advance(self, slots: np.ndarray, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one denoising step; a block that is finished gives way to an empty one.

        Args:
            slots: (n,) whose blocks these are, on the host.
            logits: (n, block, vocabulary).

        Returns:
            (n, block) ids after the step, and (n,) bool, which blocks are finished.
        """
        ids = torch.empty(len(slots), self.size, dtype=torch.long, device=self.device)
        for place in self._tiles(slots, logits.shape[-1]):
            index, own = (torch.from_numpy(each).to(self.device) for each in (place, slots[place].astype(np.int64)))
            ids[index] = self._step(slots[place], own, logits[index])
        finished = (ids != self.mask_token_id).all(-1)
        own = torch.from_numpy(slots.astype(np.int64)).to(self.device)
        self.ids[own] = ids.masked_fill(finished[:, None], self.mask_token_id)
        self.step[own] = (self.step[own] + 1).masked_fill(finished, 0)
        return ids, finished

    def _tiles(self, slots: np.ndarray, vocab_size: int) -> Iterator[np.ndarray]:
        """Places of `slots` that share a remasking rule, as many as are worked on together."""
        rules = [self.settings[slot].remasking_strategy for slot in slots.tolist()]
        most = max(TILE // (4 * self.size * vocab_size), 1)
        for _, group in groupby(sorted(range(len(slots)), key=rules.__getitem__), key=rules.__getitem__):
            places = np.array(list(group))
            yield from (places[first : first + most] for first in range(0, len(places), most))

    def _step(self, slots: np.ndarray, own: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(n, block) ids after a step of blocks that share a rule."""
        rule = REMASKING_RULES[self.settings[int(slots[0])].remasking_strategy]
        held, chosen = self.ids[own], pick_tokens(logits, self.mask_token_id)
        for place, slot in enumerate(slots.tolist()):
            if self.settings[slot].samples:
                chosen[place] = self._draw(slot, logits[place])
        measure = rule.measure(logits, probability_of(logits, chosen))
        quota, bound = self.quotas[self.num_steps[own], self.step[own]], cast(float, self.bound[own])  # one per row
        commit = rule.commit(measure, held == self.mask_token_id, quota, bound)
        return torch.where(commit, chosen, held)

    def _draw(self, slot: int, logits: torch.Tensor) -> torch.Tensor:
        """(block,) sampled ids: those of a lone `generate` with the request's seed."""
        return pick_tokens(logits[None], self.mask_token_id, self.settings[slot].sampling, self.generators[slot])[0]


def quotas(block_size: int) -> torch.Tensor:
    """(steps + 1, block) positions that a step has to commit at least, by the number of steps: the last takes all."""
    table = torch.full((block_size + 1, block_size), block_size)
    for steps in range(1, block_size + 1):
        table[steps, : steps - 1] = transfer_schedule(block_size, steps)[:-1]
    return table
