"""One denoising decision: the token each position would take, how sure it is, and which positions commit.

Everything is a pure tensor function without host synchronisation. A rule maps (measure, masked, quota, bound) to the
positions that commit at this step; the measure is larger where the model is surer. Every rule commits at least `quota`
positions, or all that are left, so that a block takes as many steps as the schedule has, at most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


def transfer_schedule(block_size: int, denoising_steps: int) -> torch.Tensor:
    """Tokens to commit at each step: `block_size // denoising_steps`, one more at the first `block_size % steps`.

    Returns:
        (denoising_steps,) counts that add up to `block_size`.
    """
    schedule = torch.full((denoising_steps,), block_size // denoising_steps)
    schedule[: block_size % denoising_steps] += 1
    return schedule


def rank_by_confidence(confidence: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Rank of each position among the masked ones of its row, 0 for the most confident; ties go to the lower position.

    Args:
        confidence: (batch, block) probabilities, or what else is larger where the model is surer.
        masked: (batch, block) bool, True where undecided.

    Returns:
        (batch, block) ranks; decided positions come last.
    """
    order = confidence.masked_fill(~masked, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(dim=-1)


def low_confidence_static(
    confidence: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Commit the `quota` most confident masked positions; the threshold plays no part."""
    return masked & (rank_by_confidence(confidence, masked) < quota[:, None])


def low_confidence_dynamic(
    confidence: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Commit every masked position above the threshold, and at least the `quota` most confident ones.

    The reference branches between the two sets; where enough positions pass the threshold the most confident `quota`
    are among them, so the union is the same without a branch.
    """
    return masked & ((confidence > threshold) | (rank_by_confidence(confidence, masked) < quota[:, None]))


def entropy_bounded(measure: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor, bound: float) -> torch.Tensor:
    """Commit the surest positions while their entropies, the largest aside, add up to at most `bound` (in nats).

    The sum bounds what the tokens say about each other (Ben-Hamu et al. 2025, arXiv 2505.24857). The measure is the
    negative entropy.
    """
    rank = rank_by_confidence(measure, masked)
    entropy = torch.zeros_like(measure).scatter(-1, rank, -measure)  # in ascending order
    within = entropy.cumsum(-1) - entropy <= bound
    return masked & (within.gather(-1, rank) | (rank < quota[:, None]))


def factor(measure: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor, bound: float) -> torch.Tensor:
    """Commit the n most probable positions for the largest n with (n + 1)(1 - p_n) < `bound`.

    The more positions commit together, the surer the last of them must be (Wu et al. 2025, arXiv 2505.22618). The
    measure is the probability.
    """
    rank = rank_by_confidence(measure, masked)
    holds = masked & ((rank + 2) * (1 - measure) < bound)
    count = torch.where(holds, rank + 1, 0).amax(-1)
    return masked & (rank < torch.maximum(count, quota)[:, None])


def frechet(measure: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor, bound: float) -> torch.Tensor:
    """Commit the n most probable positions for the largest n with (p_1 + ... + p_n - (n - 1)) - (1 - p_n) > `bound`.

    By Fréchet's inequality the first bracket is the least probability that all n tokens have together, however they
    hang on each other; the second is what the least sure one leaves to other tokens (Kasa et al. 2026,
    arXiv 2606.02955). If all are equally sure, 0 commits what `factor` commits at 1. The measure is the probability.
    """
    rank = rank_by_confidence(measure, masked)
    doubt = torch.zeros_like(measure).scatter(-1, rank, 1 - measure)  # in ascending order
    within = 1 - doubt.cumsum(-1) - doubt > bound  # falls with n
    return masked & (within.gather(-1, rank) | (rank < quota[:, None]))


def probability(logits: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """The probability of the chosen token."""
    return confidence


def probability_margin(logits: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """The difference between the two largest probabilities (batch, block)."""
    first, second = (
        (logits.float().topk(2, dim=-1).values - logits.float().logsumexp(-1, keepdim=True)).exp().unbind(-1)
    )
    return first - second


def negative_entropy(logits: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """The negative entropy of the prediction, in nats (batch, block)."""
    log_probabilities = logits.float().log_softmax(-1)
    return (log_probabilities.exp() * log_probabilities).nan_to_num(0.0).sum(-1)


@dataclass(frozen=True)
class RemaskingRule:
    """A rule, what it ranks positions by, and the setting that is its bound."""

    commit: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    bound: str


REMASKING_RULES = {
    "low_confidence_static": RemaskingRule(low_confidence_static, probability, "confidence_threshold"),
    "low_confidence_dynamic": RemaskingRule(low_confidence_dynamic, probability, "confidence_threshold"),
    "entropy_bounded": RemaskingRule(entropy_bounded, negative_entropy, "entropy_bound"),
    "factor": RemaskingRule(factor, probability, "factor"),
    "frechet": RemaskingRule(frechet, probability, "frechet_bound"),
    "margin": RemaskingRule(low_confidence_dynamic, probability_margin, "confidence_threshold"),
}


def overwritten(
    block: torch.Tensor, visible: torch.Tensor, ids: torch.Tensor, confidence: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Visible positions that take another token because it is more probable than `threshold` (eq. 12 of the paper).

    Args:
        block: (batch, block) present ids; visible: (batch, block) bool, True where decided before this step.
        ids, confidence: (batch, block) the token that each position would take now, and its probability.

    Returns:
        (batch, block) bool.
    """
    return visible & (ids != block) & (confidence > threshold)


def remasked(present: torch.Tensor, visible: torch.Tensor, threshold: float) -> torch.Tensor:
    """Visible positions whose token has become less probable than `threshold` and is masked again.

    After Wang et al. 2025 (arXiv 2503.00307), by present probability.

    Args:
        present: (batch, block) present probability of the token that each position holds.
        visible: (batch, block) bool, True where decided before this step.

    Returns:
        (batch, block) bool.
    """
    return visible & (present < threshold)


REVISION_THRESHOLDS = {"overwrite": 0.9, "remask": 0.1}  # the ways to revise, and their default thresholds


@dataclass(frozen=True)
class Revision:
    """How committed tokens of a block are revised: a way of `REVISION_THRESHOLDS`, and its threshold."""

    way: str
    threshold: float


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, by default the most probable one.

    This shapes the choice alone: confidence is always the model's own probability of the chosen token, so that one
    threshold means the same at every temperature.

    Attributes:
        temperature: 0 takes the most probable token, more than 0 samples.
        top_k: sample among the `top_k` most probable tokens, 0 for all.
        top_p: sample among the most probable tokens that together reach `top_p`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling()


def pick_tokens(
    logits: torch.Tensor,
    mask_token_id: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Choose a token for every position.

    The mask token is excluded from the choice but not from `probability_of` it, so a model that would rather leave a
    position open is less confident there.

    Args:
        logits: (batch, block, vocabulary).
        mask_token_id: id that is never chosen.
        sampling: says how.
        generator: source of randomness, on the device of the logits.

    Returns:
        (batch, block) ids.
    """
    scores = logits.clone()
    scores[..., mask_token_id] = float("-inf")
    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    # Relative to the largest, which then stays finite.
    weights = scaled(scores.float() - scores.amax(-1, keepdim=True).float(), sampling).softmax(-1)
    # The same draw as `torch.multinomial`, without its checks, for which the host waits.
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(-1)


def scaled(relative: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores, relative to the largest, at the temperature, without what the filters leave out."""
    # A temperature that float32 takes for 0 would make the largest 0 / 0.
    return filter_scores(relative / max(sampling.temperature, 1e-30), sampling.top_k, sampling.top_p)


def probability_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The model's own probability (batch, block), in float32, of the tokens `ids`."""
    return (logits.gather(-1, ids[..., None])[..., 0].float() - logits.float().logsumexp(-1)).exp()


def filter_scores(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set to -inf what top-k, then top-p (nucleus) sampling leave out; the most probable token always stays."""
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        outside[..., 0] = False
        scores = scores.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return scores


class Choice(NamedTuple):
    """The predictions of a forward for each row's block; all are (batch, block).

    Attributes:
        ids: the token that each position would take.
        confidence: its probability.
        measure: what the remasking rule ranks by.
        present: probability of the token that each position holds, where tokens may be masked again.
        reads: (batch, block, block) bool, where the choice at the first position holds only once the second, on its
            left, is decided; None where every choice holds.
        form_state: (batch,) state of each row's form behind the block once all these tokens are taken; None without.
    """

    ids: torch.Tensor
    confidence: torch.Tensor
    measure: torch.Tensor
    present: torch.Tensor | None
    reads: torch.Tensor | None = None
    form_state: torch.Tensor | None = None


@dataclass(frozen=True)
class Chooser:
    """Makes a choice of logits: the settings that have a part in it.

    Attributes:
        mask_token_id, sampling: see `pick_tokens`.
        measure: that of the remasking rule.
        keeps_present: whether the present tokens' probabilities are wanted.
    """

    mask_token_id: int
    sampling: Sampling
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    keeps_present: bool

    def choose(self, logits: torch.Tensor, held: torch.Tensor, generator: torch.Generator | None = None) -> Choice:
        """Choose a token for every position of (batch, block, vocabulary) logits; `held` (batch, block) is there."""
        return self.weigh(logits, self.pick(logits, generator), held)

    def pick(self, logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """A token (batch, block) for every position."""
        return pick_tokens(logits, self.mask_token_id, self.sampling, generator)

    def weigh(self, logits: torch.Tensor, ids: torch.Tensor, held: torch.Tensor) -> Choice:
        """The choice of `ids`, which `pick` gave, with how sure the model is."""
        confidence = probability_of(logits, ids)
        present = probability_of(logits, held) if self.keeps_present else None
        return Choice(ids, confidence, self.measure(logits, confidence), present)


def in_order(commit: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    """The positions of `commit` that do not wait for one on their left; the leftmost open ones fill the quota instead.

    So a block keeps its schedule: a choice waits only for positions on its left, and the leftmost for none.

    Args:
        commit, masked: (batch, block) bool, positions that a rule would commit, and undecided ones.
        quota: (batch,) positions to commit at least.
        reads: `Choice.reads`.

    Returns:
        (batch, block) bool.
    """
    still_open = masked.clone()
    for place in range(masked.shape[1]):
        waits = (still_open & reads[:, place]).any(-1)
        still_open[:, place] &= waits | ~commit[:, place]
    missing = quota - (masked & ~still_open).sum(-1)
    return masked & (~still_open | (still_open.cumsum(-1) <= missing[:, None]))
