"""One training step in several forms that all give the same loss."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from bard_vl import BardVLForConditionalGeneration
from bard_vl.training.losses import linear_losses, position_weights
from bard_vl.training.noise import corrupt_rows, corruption_probabilities, replacement_ids
from bard_vl.training.packing import PackedRows, Sample, dense_mask, flex_mask, pack, packed_length
from shapes import Shape
from torch import nn
from torch.nn import functional as F

RESPONSE_SHARE = 0.4  # of a sample's tokens
LOSSES = ("chunked", "selected", "full")
MASKS = ("flex", "dense")


@dataclass(frozen=True)
class Form:
    """A way to compute a step.

    Attributes:
        name: in the tables.
        packed: several samples in a row; else one, and rows padded to the longest.
        loss: "chunked": hidden states of corrupted positions, projected chunk by chunk; "selected": the same positions
            at once; "full": logits of every column, as language models compute their loss by default.
        mask: "dense" for a boolean mask, "flex" for FlexAttention.
        checkpointing: layers keep their inputs alone and run again in the backward.
    """

    name: str
    packed: bool = True
    loss: str = "chunked"
    mask: str = "dense"
    checkpointing: bool = True


def forms(masks: list[str]) -> list[Form]:
    """The package's step with the last of `masks`, the steps that differ from it in one thing, and a plain one."""
    base = Form("packed, chunked loss, checkpointing", mask=masks[-1])
    return [
        base,
        *(replace(base, name=f"{mask} mask", mask=mask) for mask in masks[:-1]),
        replace(base, name="unpacked", packed=False),
        replace(base, name="loss of selected positions at once", loss="selected"),
        replace(base, name="full logits", loss="full"),
        replace(base, name="without checkpointing", checkpointing=False),
        Form("unpacked, full logits, dense mask", packed=False, loss="full"),
    ]


def conversations(columns: int, block_size: int, num_ids: int, seed: int) -> list[Sample]:
    """Random text samples that together take at most `columns` packed columns and at least about 7/8 of them.

    The longest takes up to half of the columns, the shortest about an eighth.
    """
    generator = torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    left = columns
    while left >= columns // 8:
        share = 0.125 + 0.375 * torch.rand(1, generator=generator).item()
        wanted = min(int(share * columns), left)
        length = int(wanted / (1 + RESPONSE_SHARE)) - 2 * block_size  # at most one block pads each of two copies
        prompt = max(int(length * (1 - RESPONSE_SHARE)), 1)
        length = max(length, prompt + 1)
        samples.append(
            Sample(
                input_ids=torch.randint(num_ids, (length,), generator=generator),
                position_ids=torch.arange(length).expand(3, -1),
                responses=[(prompt, length)],
                visual_index=torch.full((length,), -1),
                sample_id=len(samples),
            )
        )
        left -= packed_length(samples[-1].responses, length, block_size)
    return samples


@dataclass
class Batch:
    """Corrupted rows on a device; tensors are (rows, columns).

    Attributes:
        rows: clean, with what the mask needs.
        noisy_ids: what the model sees.
        weights: of the positions.
        normaliser: what the weighted sum of losses is divided by.
    """

    rows: PackedRows
    noisy_ids: torch.Tensor
    weights: torch.Tensor
    normaliser: float


def make_batch(
    samples: list[Sample], packed: bool, block_size: int, multiple: int, shape: Shape, device: torch.device
) -> Batch:
    """All samples in one row, or each in a row of its own, padded to the longest; the noise of a sample is the same."""
    lengths = [packed_length(sample.responses, len(sample.input_ids), block_size) for sample in samples]
    if packed:
        rows = pack(samples, block_size, sum(lengths), 0, shape.eos_token_id, multiple)
    else:
        width = -(-max(lengths) // multiple) * multiple
        rows = stack([pack([sample], block_size, width, 0, shape.eos_token_id, width) for sample in samples])
    replacements = replacement_ids(shape.num_prompt_ids, shape.mask_token_id)
    noise = corrupt_rows(rows, block_size, "mixed", "block", shape.mask_token_id, replacements, seed=0, step=0)
    masked, replaced = corruption_probabilities("mixed", noise.t)
    weights, normaliser = position_weights(
        "corrupted_mean", noise.corrupted, masked + replaced, rows.noisy, rows.sample, rows.is_response_padding
    )
    return Batch(rows.to(device), noise.ids.to(device), weights.to(device), max(normaliser, 1.0))


def stack(parts: list[PackedRows]) -> PackedRows:
    """Rows of one width and one text sample each, below each other."""
    stacked: dict[str, Any] = {
        each.name: torch.cat([getattr(part, each.name) for part in parts], dim=-2)
        for each in fields(PackedRows)
        if each.name not in ("block_size", "visual_inputs", "sample_ids")
    }
    numbers = torch.arange(len(parts))[:, None]
    stacked["sample"] = torch.where(stacked["sample"] < 0, -1, numbers)
    return replace(parts[0], **stacked, sample_ids=torch.cat([part.sample_ids for part in parts]))


class Step:
    """Forward, backward and AdamW on one model, in any form.

    The learning rate is 0: the work is that of a step, and the loss stays what it is.
    """

    def __init__(self, model: BardVLForConditionalGeneration, chunk_size: int, with_optimizer: bool):
        self.model, self.chunk_size = model.train(), chunk_size
        # One fused kernel: no temporary copies of all parameters in the peak.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        self.with_optimizer = with_optimizer

    def run(self, form: Form, batch: Batch) -> float:
        """One step; returns its loss."""
        self.set_checkpointing(form.checkpointing)
        layout = batch.rows.layout()
        mask = flex_mask(layout) if form.mask == "flex" else dense_mask(layout)[:, None]
        outputs = self.model(
            input_ids=batch.noisy_ids,
            attention_mask=mask,
            position_ids=batch.rows.position_ids,
            use_cache=False,
            objective=self.objective(form, batch),
        )
        loss = outputs.loss / batch.normaliser
        loss.backward()
        if self.with_optimizer:
            self.optimizer.step()
        self.clear()
        return loss.item()

    def clear(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def set_checkpointing(self, wanted: bool) -> None:
        """Switch the recomputation of layers on or off."""
        with warnings.catch_warnings():
            # The newest lines of transformers have other names for both, the older ones only these.
            warnings.simplefilter("ignore", FutureWarning)
            if wanted:
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                self.model.gradient_checkpointing_disable()

    def objective(self, form: Form, batch: Batch) -> Callable[[torch.Tensor, nn.Module], torch.Tensor]:
        """The loss function: the model calls it with hidden states (rows, columns, hidden) and its head."""
        clean, weights = batch.rows.input_ids, batch.weights
        if form.loss == "full":

            def full(hidden: torch.Tensor, head: nn.Module) -> torch.Tensor:
                logits = head(hidden).float()
                losses = F.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none")
                return (losses * weights.flatten()).sum()

            return full

        chosen = weights > 0

        def selected(hidden: torch.Tensor, head: nn.Module) -> torch.Tensor:
            targets = clean[chosen]
            chunk_size = self.chunk_size if form.loss == "chunked" else max(len(targets), 1)
            return linear_losses(hidden[chosen], head, targets, weights[chosen], chunk_size=chunk_size).loss

        return selected
