"""Corruption of responses: which tokens are masked, which are replaced by random ones, and how strongly at which time.

Time as in the paper (arXiv 2604.16514): t = 0 corrupts everything, t = 1 nothing. Pure tensor functions; all randomness
comes from the generator that is passed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from typing import NamedTuple

import torch

from .packing import NEVER, PackedRows

NOISE_KINDS = ("mask", "uniform", "mixed")
TIME_SCHEMES = ("sample", "block", "stratified")


class Corrupted(NamedTuple):
    """Corrupted tokens; every field has the shape of the ids that were corrupted.

    Attributes:
        ids: long, what the model sees.
        masked: bool, True where the mask token is now.
        replaced: bool, True where another token is now, never the original one.
        t: float32 time of each token, 1 where nothing was to be corrupted.
        drafted: bool, masked tokens whose place the model's own prediction is to take before it learns.
    """

    ids: torch.Tensor
    masked: torch.Tensor
    replaced: torch.Tensor
    t: torch.Tensor
    drafted: torch.Tensor

    @property
    def corrupted(self) -> torch.Tensor:
        """S_t of the paper: masked or replaced."""
        return self.masked | self.replaced


def corruption_probabilities(kind: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability that a token is masked, and that it is replaced, at time t.

    "mask": 1 - t and 0. "uniform": 0 and 1 - t. "mixed", with phi = pi t / 2: 1 - sin phi and cos phi + sin phi - 1,
    which over all times masks .363 of the tokens, replaces .273 and leaves .363.

    Args:
        kind: one of `NOISE_KINDS`.
        t: times in [0, 1], any shape.

    Raises:
        ValueError: another kind, or a time outside [0, 1].
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"the kind of noise must be one of {NOISE_KINDS}, got {kind!r}")
    outside = ~((t >= 0) & (t <= 1))
    if outside.any():
        raise ValueError(f"times must lie in [0, 1], got {t[outside][0].item()}")
    if kind == "mask":
        return 1 - t, torch.zeros_like(t)
    if kind == "uniform":
        return torch.zeros_like(t), 1 - t
    phi = math.pi / 2 * t
    # Rounding makes cos(pi / 2) a little less than 0.
    return (1 - phi.sin()).clamp_(min=0), (phi.cos() + phi.sin() - 1).clamp_(min=0)


def sample_times(
    num_blocks: int, scheme: str, generator: torch.Generator, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """Times of the blocks of one sample, each uniform in [low, high).

    Args:
        num_blocks: noisy blocks of all turns of the sample.
        scheme: "sample": one time for all blocks; "block": each block its own; "stratified": each block its own, one in
            each of `num_blocks` equal parts of the range, in random order.
        generator: of the CPU.
        low, high: 0 <= low <= high <= 1. A `high` below 1 bounds the weights of the inverse-time loss.

    Returns:
        (num_blocks,) float32.

    Raises:
        ValueError: an unknown scheme, a negative number of blocks or a range outside [0, 1].
    """
    if scheme not in TIME_SCHEMES:
        raise ValueError(f"the scheme of times must be one of {TIME_SCHEMES}, got {scheme!r}")
    if num_blocks < 0:
        raise ValueError(f"the number of blocks must not be negative, got {num_blocks}")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"times must have 0 <= low <= high <= 1, got low {low} and high {high}")
    if scheme == "sample":
        unit = torch.rand(1, generator=generator, dtype=torch.float32).expand(num_blocks)
    elif scheme == "block":
        unit = torch.rand(num_blocks, generator=generator, dtype=torch.float32)
    else:
        stratum = torch.randperm(num_blocks, generator=generator)
        unit = (stratum + torch.rand(num_blocks, generator=generator, dtype=torch.float32)) / max(num_blocks, 1)
    # In float32 the last stratum can round up to its end.
    return (low + (high - low) * unit).clamp(low, high)


def replacement_ids(
    vocab_size: int, mask_token_id: int, special_ids: Collection[int] = (), allow_special: bool = False
) -> torch.Tensor:
    """Ids that may replace a token: all but the mask token, and special ones only if asked.

    Args:
        vocab_size: ids that mean something, `len(tokenizer)`; rows of the embedding beyond it were never trained.
        mask_token_id: never a replacement.
        special_ids: special tokens of the tokenizer; those beyond `vocab_size` play no part.
        allow_special: let them be replacements too.

    Returns:
        Ascending ids (n,), long.

    Raises:
        ValueError: no id is left.
    """
    allowed = torch.ones(max(vocab_size, 0), dtype=torch.bool)
    excluded = {mask_token_id, *(() if allow_special else special_ids)}
    allowed[[token for token in excluded if 0 <= token < vocab_size]] = False
    if not allowed.any():
        raise ValueError(f"no id is left as a replacement: a vocabulary of {vocab_size}, less {sorted(excluded)}")
    return allowed.nonzero()[:, 0]


def corrupt(
    ids: torch.Tensor,
    t: torch.Tensor,
    kind: str,
    mask_token_id: int,
    replacements: torch.Tensor,
    generator: torch.Generator,
) -> Corrupted:
    """Mask or replace every token independently with the probabilities of its time.

    A replacement is drawn uniformly among the allowed ids other than the token itself: every replaced position is truly
    corrupted, so the shares are exactly those of `corruption_probabilities`, and the loss never counts a clean token as
    corrupted. No minimum is enforced: at times near 1 a block may stay clean, which an added corruption would belie.

    Args:
        ids: clean tokens, any shape, without the mask token.
        t: time of each token, broadcastable to `ids`.
        kind: one of `NOISE_KINDS`.
        mask_token_id: what masked positions hold.
        replacements: (n,) ascending ids as `replacement_ids` gives them; not read by "mask" noise.
        generator: on the device of the ids. It is advanced alike for every kind, so kinds share their draws.

    Raises:
        ValueError: an unknown kind, a time outside [0, 1], the mask token among ids or replacements, or replacements
            that are unsorted or fewer than two.
    """
    t = t.to(torch.float32).expand(ids.shape)
    mask_probability, uniform_probability = corruption_probabilities(kind, t)
    if (ids == mask_token_id).any():
        raise ValueError(f"the ids to corrupt hold the mask token {mask_token_id} already")
    draw = torch.rand(ids.shape, generator=generator, dtype=torch.float32, device=ids.device)
    which = torch.rand(ids.shape, generator=generator, device=ids.device, dtype=torch.float64)
    masked = draw < mask_probability
    replaced = ~masked & (draw < mask_probability + uniform_probability)
    corrupted = ids.masked_fill(masked, mask_token_id)
    if kind != "mask":
        _check_replacements(replacements, mask_token_id)
        corrupted = torch.where(replaced, _others(ids, replacements.to(ids.device), which), corrupted)
    return Corrupted(corrupted, masked, replaced, t, torch.zeros_like(masked))


def complement(
    ids: torch.Tensor,
    noise: Corrupted,
    kind: str,
    mask_token_id: int,
    replacements: torch.Tensor,
    generator: torch.Generator,
) -> Corrupted:
    """Noise that is the first one's counterpart, as drawn with 1 - u for u, at the times 1 - t.

    "mask": masks what the first shows, and shows what it masks. "uniform": replaces what the first leaves. "mixed":
    masks what the first leaves, leaves what it masks, and replaces what it replaces, by another draw. So every token is
    corrupted in one of the two, and shares are those of `corruption_probabilities` at 1 - t.

    Args:
        ids: clean tokens, any shape.
        noise: of these ids, from `corrupt`.
        kind, mask_token_id, replacements, generator: as in `corrupt`.
    """
    left = ~noise.corrupted
    nothing = torch.zeros_like(left)
    masked, replaced = {"mask": (left, nothing), "uniform": (nothing, left), "mixed": (left, noise.replaced)}[kind]
    corrupted = ids.masked_fill(masked, mask_token_id)
    which = torch.rand(ids.shape, generator=generator, device=ids.device, dtype=torch.float64)
    if kind != "mask":
        corrupted = torch.where(replaced, _others(ids, replacements.to(ids.device), which), corrupted)
    return Corrupted(corrupted, masked, replaced, 1 - noise.t, torch.zeros_like(masked))


def recorded_state(
    ids: torch.Tensor, order: torch.Tensor, block: torch.Tensor, mask_token_id: int, generator: torch.Generator
) -> Corrupted:
    """The answers' blocks as they stood before a random step of their decoding: the rest is masked.

    A block that `n` steps decided stands before step 0, 1, ... or n - 1, each as likely as the others, independently of
    the other blocks. Its time is the share of it that is visible.

    Args:
        ids: (length,) clean tokens.
        order: (length,) step that decided each, at least 0; steps of `NEVER` are beyond all others.
        block: (length,) number of each token's block, ascending from 0.
        mask_token_id: what masked positions hold.
        generator: of the CPU.
    """
    num_blocks = int(block.max()) + 1 if len(block) else 0
    steps = torch.zeros(num_blocks, dtype=torch.long)
    steps.scatter_reduce_(0, block, torch.where(order == NEVER, 0, order + 1), "amax")
    draw = torch.rand(num_blocks, generator=generator, dtype=torch.float64)
    shown = order < (draw * steps).long()[block]
    shares = torch.zeros(num_blocks).index_add_(0, block, shown.float()) / block.bincount(minlength=num_blocks)
    masked = ~shown
    nothing = torch.zeros_like(masked)
    return Corrupted(ids.masked_fill(masked, mask_token_id), masked, nothing, shares[block], nothing.clone())


def _check_replacements(replacements: torch.Tensor, mask_token_id: int) -> None:
    if len(replacements) < 2:
        raise ValueError(f"noise by replacement needs at least two ids, got {replacements.tolist()}")
    if (replacements.diff() <= 0).any():
        raise ValueError("the ids of replacements must ascend, without repetition")
    if (replacements == mask_token_id).any():
        raise ValueError(f"the mask token {mask_token_id} must not be a replacement")


def _others(ids: torch.Tensor, replacements: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """For each id another one: `which` in [0, 1) picks among the replacements with the id itself left out."""
    place = torch.searchsorted(replacements, ids).clamp(max=len(replacements) - 1)
    is_among = replacements[place] == ids
    pick = (which * (len(replacements) - is_among.long())).long()
    return replacements[pick + (is_among & (pick >= place))]


def noise_generator(seed: int, step: int, sample_id: int, repeat: int = 0) -> torch.Generator:
    """CPU generator for the noise of one sample at one optimiser step, the same wherever the sample lands.

    `repeat` counts how often the sample was drawn before in the step.
    """
    text = f"{seed} {step} {sample_id}" + (f" {repeat}" if repeat else "")
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # torch's CPU generator reads 32 bits of a seed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def corrupt_rows(
    rows: PackedRows,
    block_size: int,
    kind: str,
    scheme: str,
    mask_token_id: int,
    replacements: torch.Tensor,
    seed: int,
    step: int,
    low: float = 0.0,
    high: float = 1.0,
    repeats: torch.Tensor | None = None,
    draft_share: float = 0.0,
) -> Corrupted:
    """Corrupt the noisy copies of packed rows; everything else stays clean.

    The noise of a sample depends on (seed, step, sample id, repeat) and its own noisy tokens alone: it is the same in
    any packing, order, number of processes and on any device. Response padding is corrupted like the rest of its block.
    A second noisy copy gets the first one's `complement`; the first copy's noise is that which it has alone. Which
    masks become drafts is drawn last, so the rest of the noise is the same at every share.

    Answers with an order of commitment get no such noise: their blocks are `recorded_state`s, a second copy's too.

    Args:
        rows: packed samples.
        block_size: tokens per block; a block has one time.
        kind, mask_token_id, replacements: as in `corrupt`.
        scheme, low, high: as in `sample_times`; blocks are counted over all turns of a sample.
        seed, step: of the run, and of the optimiser.
        repeats: (samples or more,) how often each sample was drawn before in the step; None for never.
        draft_share: probability that a masked token is to hold the model's draft (DMax, arXiv 2604.08302).

    Returns:
        `Corrupted` of (rows, length) tensors on the rows' device.

    Raises:
        ValueError: as `corrupt` and `sample_times` do.
    """
    layout = rows.layout(block_size)
    sample, turn, noisy, place, rank, view = (
        field.cpu() for field in (layout.sample, layout.turn, layout.noisy, layout.place, layout.rank, layout.view)
    )
    clean, order = rows.input_ids.cpu(), rows.order.cpu()
    ids, t = clean.clone(), torch.ones(clean.shape, dtype=torch.float32)
    masked, replaced, drafted = (torch.zeros_like(noisy) for _ in range(3))
    # By turn and place, so that no order of the copies within a row can matter.
    key = turn * (place.max() + 1) + place
    repeats = torch.zeros_like(rows.sample_ids) if repeats is None else repeats
    for number, (sample_id, repeat) in enumerate(zip(rows.sample_ids.tolist(), repeats.tolist(), strict=False)):
        copies = [in_order(noisy & (sample == number) & (view == copy), key) for copy in range(int(view.max()) + 1)]
        where = copies[0]
        blocks, block = torch.stack([turn[where], rank[where]]).unique_consecutive(dim=1, return_inverse=True)
        generator = noise_generator(seed, step, sample_id, repeat)
        if (order[where] >= 0).any():
            noises = [recorded_state(clean[where], order[where], block, mask_token_id, generator) for _ in copies]
        else:
            times = sample_times(blocks.shape[1], scheme, generator, low, high)[block]
            noises = [corrupt(clean[where], times, kind, mask_token_id, replacements, generator)]
            if len(copies) > 1:
                noises.append(complement(clean[where], noises[0], kind, mask_token_id, replacements, generator))
        for copy, each in zip(copies, noises, strict=True):
            draw = torch.rand(each.masked.shape, generator=generator, dtype=torch.float32)
            each = each._replace(drafted=each.masked & (draw < draft_share))
            for target, value in zip((ids, masked, replaced, t, drafted), each, strict=True):
                target[copy] = value
    device = rows.input_ids.device
    return Corrupted(*(each.to(device) for each in (ids, masked, replaced, t, drafted)))


def in_order(chosen: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Indices of the chosen tokens, ascending by key."""
    where = chosen.nonzero(as_tuple=True)
    order = key[where].argsort()
    return tuple(index[order] for index in where)


__all__ = [
    "NOISE_KINDS",
    "TIME_SCHEMES",
    "Corrupted",
    "complement",
    "corrupt",
    "corrupt_rows",
    "corruption_probabilities",
    "noise_generator",
    "recorded_state",
    "replacement_ids",
    "sample_times",
]
