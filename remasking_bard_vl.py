"""One denoising decision: the token each position would take, how sure it is, and which positions commit.

Everything is a pure tensor function without host synchronisation. A rule maps (confidence, masked, quota, threshold) to
the positions that commit at this step; every rule commits at least `quota` positions, or all that are left.
"""

from collections.abc import Callable

import torch

RemaskingRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


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
        confidence: (batch, block) probabilities.
        masked: (batch, block) bool, True where undecided.

    Returns:
        (batch, block) ranks; decided positions come last.
    """
    order = confidence.masked_fill(~masked, -1.0).sort(dim=-1, descending=True, stable=True).indices
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


REMASKING_RULES: dict[str, RemaskingRule] = {
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
}


def choose_tokens(
    logits: torch.Tensor,
    mask_token_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for every position and say how probable the model finds it.

    The mask token is excluded from the choice but not from the softmax, so a model that would rather leave a position
    open is less confident there. Temperature, top-k and top-p shape the choice alone: confidence is always the model's
    own probability of the chosen token, so that one threshold means the same at every temperature.

    Args:
        logits: (batch, block, vocabulary).
        mask_token_id: id that is never chosen.
        temperature: 0 takes the most probable token, more than 0 samples.
        top_k: sample among the `top_k` most probable tokens, 0 for all.
        top_p: sample among the most probable tokens that together reach `top_p`.
        generator: source of randomness, on the device of the logits.

    Returns:
        ids (batch, block) and confidence (batch, block) in float32.
    """
    log_normaliser = torch.logsumexp(logits.float(), dim=-1)
    scores = logits.index_fill(-1, torch.tensor(mask_token_id, device=logits.device), float("-inf"))
    if temperature == 0:
        ids = scores.argmax(dim=-1)
    else:
        # Relative to the largest, which then stays finite however small the temperature.
        relative = scores.float() - scores.amax(-1, keepdim=True).float()
        weights = filter_scores(relative / temperature, top_k, top_p).softmax(-1)
        ids = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(logits.shape[:2])
    chosen = scores.gather(-1, ids[..., None])[..., 0]
    return ids, (chosen.float() - log_normaliser).exp()


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


__all__ = [
    "REMASKING_RULES",
    "choose_tokens",
    "filter_scores",
    "low_confidence_dynamic",
    "low_confidence_static",
    "rank_by_confidence",
    "transfer_schedule",
]
