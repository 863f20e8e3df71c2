"""Losses of block diffusion: weights of positions, distillation, and a vocabulary projection in chunks.

A loss is `sum(weight * loss of a position) / normaliser`. Sums and normalisers add up over rows, accumulation steps and
processes, so packed samples give exactly the loss and the gradients of separate ones.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The forms, and what response padding weighs in each.
LOSS_FORMS = {"sample_mean": 1.0, "corrupted_mean": 1.0, "inverse_time": 0.5}
DIRECTIONS = ("forward", "reverse")


def position_weights(
    form: str,
    corrupted: torch.Tensor,
    probability: torch.Tensor,
    noisy: torch.Tensor,
    sample: torch.Tensor,
    is_response_padding: torch.Tensor,
    padding_weight: float | None = None,
    visible: torch.Tensor | None = None,
    visible_weight: float = 0.0,
) -> tuple[torch.Tensor, float]:
    """Weights of the positions, and what the weighted sum of losses is to be divided by.

    "sample_mean" is the paper's: the mean over S_t, the corrupted positions, within each sample, then over samples: a
    short answer counts as much as a long one. The sum of a sample's weights stands for |S_t| and is taken as 1 where it
    is less, as the paper's max(1, |S_t|). "corrupted_mean" is the mean over the corrupted positions of all samples: a
    long answer counts for more. "inverse_time" is the reference's: a corrupted position weighs
    1 / P(corrupted at its time), 1 / t_mask for mask noise; the sum of a sample is divided by the number of its noisy
    response tokens, and samples are averaged.

    Neither says anything of tokens that the noise left alone: of what is visible only replaced tokens are learnt, and a
    model may find that whatever it sees is wrong. `visible_weight` lets it learn what is right too, as revision needs.

    Add the normalisers of all rows that make up one optimiser step, on all processes, and divide by
    `max(1, total)`.

    Args:
        form: one of `LOSS_FORMS`.
        corrupted: bool, S_t.
        probability: that a position is corrupted at its time, `sum(corruption_probabilities(kind, t))`.
        noisy: bool, the noisy response tokens.
        sample: number of each position's sample, less than 0 for none; these positions hold a sample as a whole.
        is_response_padding: bool, what fills up a response's last block.
        padding_weight: factor on response padding, default 0.5 for "inverse_time" and 1 for the others.
        visible: bool, the noisy tokens that are not corrupted and learnt nevertheless; None for none of them.
        visible_weight: of these, beside 1 for a corrupted position, or in the reference's form for one that is always
            corrupted.

    All tensors are (rows, length) or of another common shape.

    Returns:
        weights, float32, 0 where nothing is learnt; and the normaliser: the sum of the weights for "corrupted_mean",
        the number of samples with noisy tokens for the others.

    Raises:
        ValueError: an unknown form, a negative padding weight, or corrupted positions that are not noisy.
    """
    if form not in LOSS_FORMS:
        raise ValueError(f"the form of the loss must be one of {tuple(LOSS_FORMS)}, got {form!r}")
    padding_weight = LOSS_FORMS[form] if padding_weight is None else padding_weight
    if not padding_weight >= 0:
        raise ValueError(f"the weight of response padding must not be negative, got {padding_weight}")
    if (corrupted & ~noisy).any():
        raise ValueError("a position outside the noisy responses is marked as corrupted")
    factor = torch.where(is_response_padding, padding_weight, 1.0).to(torch.float32)
    kept = torch.zeros_like(factor) if visible is None else factor * visible * visible_weight
    weights = factor * corrupted + kept
    if form == "corrupted_mean":
        return weights, weights.sum(dtype=torch.float64).item()
    number = sample.clamp(min=0)
    tokens = sample[noisy].bincount(minlength=int(number.max()) + 1)
    if form == "sample_mean":
        sums = torch.zeros(len(tokens), dtype=torch.float64, device=weights.device)
        sums.index_add_(0, number.flatten(), weights.flatten().double())
        weights = weights / sums.clamp(min=1)[number]
    else:
        counts = tokens[number].clamp(min=1)
        weights = torch.where(corrupted, weights / (probability * counts), kept / counts)
    return weights.to(torch.float32), float((tokens > 0).sum().item())


def kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    direction: str = "forward",
    temperature: float = 1.0,
    top_k: int | None = None,
) -> torch.Tensor:
    """Divergence of a student from a teacher at each position, both at the same temperature.

    "forward" is KL(teacher || student), "reverse" is KL(student || teacher). With `top_k` only the tokens that the
    teacher finds most probable count, as `top_k_divergence` says. The factor temperature^2, which keeps gradients of
    one size over temperatures, is not in here; `linear_losses` has it.

    Args:
        student_logits, teacher_logits: (..., vocabulary).
        direction: one of `DIRECTIONS`.
        temperature: more than 0; divides the logits.
        top_k: None for the whole vocabulary.

    Returns:
        (...) in nats, at least float32.

    Raises:
        ValueError: an unknown direction, a temperature or `top_k` out of range, or vocabularies that differ.
    """
    check_distillation(direction, temperature, top_k, student_logits.shape[-1], teacher_logits.shape[-1])
    if top_k is not None:
        values, ids = teacher_logits.topk(top_k, dim=-1)
        return top_k_divergence(student_logits, values, ids, direction, temperature)
    student = _log_probabilities(student_logits, temperature)
    teacher = _log_probabilities(teacher_logits, temperature)
    if direction == "forward":
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)


def top_k_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    direction: str = "forward",
    temperature: float = 1.0,
) -> torch.Tensor:
    """Divergence on the tokens that the teacher finds most probable, its distribution q renormalised over them.

    "forward": the cross entropy -sum q log p with the student's p over the whole vocabulary; the teacher's entropy,
    which no gradient sees, is not subtracted. "reverse": KL(p || q) with p renormalised over those tokens too.

    Args:
        student_logits: (..., vocabulary).
        teacher_logits, teacher_ids: (..., k) the teacher's logits of its best tokens, and which these are.
        direction, temperature: as in `kl_divergence`.

    Returns:
        (...) in nats, at least float32.

    Raises:
        ValueError: an unknown direction, or a temperature that is not positive.
    """
    check_distillation(direction, temperature)
    teacher = _log_probabilities(teacher_logits, temperature)
    if direction == "forward":
        student = _log_probabilities(student_logits, temperature).gather(-1, teacher_ids)
        return -(teacher.exp() * student).sum(-1)
    student = _log_probabilities(student_logits.gather(-1, teacher_ids), temperature)
    return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)


def _log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = at_least_float32(logits)
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision is too coarse for a loss over a vocabulary; double stays double."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_distillation(
    direction: str,
    temperature: float,
    top_k: int | None = None,
    student_vocabulary: int | None = None,
    teacher_vocabulary: int | None = None,
) -> None:
    """Raise `ValueError` naming the value that distillation cannot work with."""
    if direction not in DIRECTIONS:
        raise ValueError(f"the direction of a divergence must be one of {DIRECTIONS}, got {direction!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"the temperature of distillation must be positive, got {temperature}")
    if student_vocabulary != teacher_vocabulary:
        raise ValueError(
            f"student and teacher must share a vocabulary, got {student_vocabulary} and {teacher_vocabulary} tokens"
        )
    if top_k is not None and not 1 <= top_k <= (student_vocabulary or top_k):
        raise ValueError(f"`top_k` must lie between 1 and the vocabulary of {student_vocabulary}, got {top_k}")


class LinearLosses(NamedTuple):
    """The result of `linear_losses`.

    Attributes:
        loss: scalar, the weighted sum over positions; divide it by the normaliser. Always part of the graph.
        cross_entropy: (n,) of each position in nats, detached.
        divergence: (n,) of each position in nats, detached, without the factor temperature^2, 0 where the teacher is
            not followed; None without a teacher.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: torch.Tensor | None


Head = nn.Module | torch.Tensor


def linear_losses(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    teacher: tuple[torch.Tensor, Head] | None = None,
    taught: torch.Tensor | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    direction: str = "forward",
    temperature: float = 1.0,
    top_k: int | None = None,
    certainty_weight: float = 0.0,
    certainty_temperature: float = 0.5,
    chunk_size: int = 1024,
) -> LinearLosses:
    """Sum of weighted losses of hidden states, projected to the vocabulary chunk by chunk.

    The loss of a position is `ce_weight * CE + kd_weight * temperature^2 * KL`; where the teacher is not followed it is
    `(ce_weight + kd_weight) * CE`. Where the likeliest token is the right one already, `certainty_weight` times the
    entropy of the prediction at `certainty_temperature` is added (dParallel, arXiv 2509.26488). Select the positions
    that have a weight first: `hidden[weights > 0]`. No tensor of more than `chunk_size` positions x vocabulary exists,
    forward or backward, nor such tensors of two chunks at once: all chunks but the last, which backward begins with,
    run under activation checkpointing. Logits are computed in the dtype of the hidden states, what follows in float32.
    No positions give a loss of 0 that is part of the graph.

    PyTorch's `linear_cross_entropy` (2.13 and later) projects in chunks too, and takes weights through
    `reduction="none"`, but it returns losses of bfloat16 hidden states in bfloat16, knows no teacher and wants a bare
    weight, where a head may be a module with hooks or adapters. Liger's fused kernel runs under Triton only, and gave
    wrong gradients with `reduction="none"` up to 2026 (pull request 1298).

    Args:
        hidden: (n, hidden size) of the student.
        head: the student's output projection: a module, or a weight (vocabulary, hidden size). Sharded weights are
            whole inside the model's forward only; there give the weight, since a module's hooks communicate once a
            chunk, and the number of chunks differs between processes.
        targets: (n,) clean ids.
        weights: (n,) as `position_weights` gives them.
        teacher: hidden states (n, any size) and head of the teacher, which gets no gradient.
        taught: (n,) bool, where the teacher is followed; None for everywhere.
        ce_weight, kd_weight: of the mixture.
        direction, temperature, top_k: as in `kl_divergence`.
        certainty_weight, certainty_temperature: of the entropy of predictions that are right already.
        chunk_size: positions projected at a time.

    Raises:
        ValueError: shapes, weights or settings that do not go together.
        TypeError: a head's weight that is still sharded.
    """
    _check_linear(hidden, head, targets, weights, teacher, taught, ce_weight, kd_weight, chunk_size)
    taught = torch.ones_like(targets, dtype=torch.bool) if taught is None else taught
    check_distillation(direction, temperature, top_k)
    check_certainty(certainty_weight, certainty_temperature)
    divergence = partial(kl_divergence, direction=direction, temperature=temperature, top_k=top_k)
    certainty = partial(certainty_loss, weight=certainty_weight, temperature=certainty_temperature)
    weights_of_losses = ce_weight + kd_weight, ce_weight, kd_weight * temperature**2
    mixture = partial(_chunk_losses, head, divergence, certainty, *weights_of_losses)
    chunks = []
    for start in range(0, max(len(hidden), 1), chunk_size):
        part = slice(start, start + chunk_size)
        teaching = None if teacher is None else (teacher[0][part].detach(), teacher[1], taught[part])
        arguments = hidden[part], targets[part], weights[part], teaching
        is_last = start + chunk_size >= len(hidden)
        chunks.append(mixture(*arguments) if is_last else checkpoint(mixture, *arguments, use_reentrant=False))
    losses, entropies, divergences = zip(*chunks, strict=True)
    return LinearLosses(
        torch.stack(losses).sum(), torch.cat(entropies), None if teacher is None else torch.cat(divergences)
    )


def _chunk_losses(head, divergence, certainty, weight_alone, ce_weight, kd_weight, hidden, targets, weights, teacher):
    """(weighted sum, cross entropy, divergence or None) of some positions; the latter two are detached."""
    logits = at_least_float32(_project(hidden, head))
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    extra = certainty(logits, targets)
    if teacher is None:
        return ((ce_weight * cross_entropy + extra) * weights).sum(), cross_entropy.detach(), None
    *teacher, taught = teacher
    with torch.no_grad():
        teacher_logits = _project(*teacher)
    distance = torch.where(taught, divergence(logits, teacher_logits), 0.0)
    entropies = torch.where(taught, ce_weight * cross_entropy, weight_alone * cross_entropy)
    losses = entropies + kd_weight * distance + extra
    return (losses * weights).sum(), cross_entropy.detach(), distance.detach()


def certainty_loss(
    logits: torch.Tensor, targets: torch.Tensor, weight: float, temperature: float
) -> torch.Tensor | float:
    """Weighted entropy in nats, (n,), of predictions (n, vocabulary) at a temperature; 0 where they are wrong."""
    if not weight:
        return 0.0
    shares = _log_probabilities(logits, temperature)
    entropy = -(shares.exp() * shares).sum(-1)
    return weight * torch.where(logits.argmax(-1) == targets, entropy, 0.0)


def check_certainty(weight: float, temperature: float) -> None:
    """Raise `ValueError` naming the value that the loss of certainty cannot work with."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"the weight of certainty must be at least 0, got {weight}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature of certainty must be positive, got {temperature}")


def _project(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    return head(hidden) if isinstance(head, nn.Module) else F.linear(hidden, head)


@torch.no_grad()
def likeliest(hidden: torch.Tensor, head: Head, excluded: int, chunk_size: int = 1024) -> torch.Tensor:
    """The token that each position (n, hidden size) predicts, (n,) long, but for one `excluded` id."""
    found = []
    for part in hidden.split(chunk_size):
        logits = _project(part, head)
        logits[:, excluded] = -math.inf
        found.append(logits.argmax(-1))
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.long)


def _check_linear(hidden, head, targets, weights, teacher, taught, ce_weight, kd_weight, chunk_size) -> None:
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1] or weights.shape != hidden.shape[:1]:
        raise ValueError(
            "hidden states, targets and weights must be (n, hidden size), (n,) and (n,), got "
            f"{tuple(hidden.shape)}, {tuple(targets.shape)} and {tuple(weights.shape)}"
        )
    if taught is not None and taught.shape != hidden.shape[:1]:
        raise ValueError(f"what is taught must be {tuple(hidden.shape[:1])}, got {tuple(taught.shape)}")
    if teacher is not None and len(teacher[0]) != len(hidden):
        raise ValueError(f"the teacher has hidden states of {len(teacher[0])} positions, the student of {len(hidden)}")
    if not (ce_weight >= 0 and kd_weight >= 0 and ce_weight + kd_weight > 0):
        raise ValueError(f"weights must be positive, or one of them 0, got CE {ce_weight} and KD {kd_weight}")
    if kd_weight and teacher is None:
        raise ValueError(f"distillation with weight {kd_weight} needs a teacher")
    if chunk_size < 1:
        raise ValueError(f"the chunk size must be at least 1, got {chunk_size}")
    for tensor in [head, *(teacher[1:] if teacher else ())]:
        if isinstance(getattr(tensor, "weight", tensor), DTensor):
            raise TypeError("the head's weight is still sharded: compute the loss inside the model's forward")


__all__ = [
    "DIRECTIONS",
    "LOSS_FORMS",
    "LinearLosses",
    "at_least_float32",
    "certainty_loss",
    "check_certainty",
    "check_distillation",
    "kl_divergence",
    "likeliest",
    "linear_losses",
    "position_weights",
    "top_k_divergence",
]
