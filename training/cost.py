"""The cost of a run, before it starts: parameters, tokens, steps, memory of each GPU."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .arguments import PARAMETER_GROUPS
from .packing import TILE, first_fit_decreasing
from .trainer import group_of

GIB = 2**30
STEPS_LOOKED_AT = 64


@dataclass
class Cost:
    """Numbers of a stage; memory in bytes per process.

    Attributes:
        parameters: by group, (all, trainable).
        samples: of an optimizer step, over accumulation steps and processes.
        tokens_per_sample: packed, copies included; mean; None for a stream.
        largest: columns of the largest micro-batch, with what pads its rows.
        steps: optimizer steps.
        sharding: "none" (DDP or one process), "zero1", "zero2", "zero3" or "fsdp".
        memory: by what it is for.
    """

    parameters: dict[str, tuple[int, int]]
    samples: int
    tokens_per_sample: float | None
    largest: int
    steps: int
    sharding: str
    memory: dict[str, float]

    @classmethod
    def of(cls, trainer: Any) -> "Cost":
        """Count and estimate for a trainer that has not begun."""
        args, model = trainer.args, trainer.model
        lengths = getattr(trainer.train_dataset, "lengths", None)
        length = sum(lengths) / len(lengths) if lengths else None
        shape = largest_batch(trainer)
        tokens = math.prod(shape)
        sharding = sharding_of(trainer)
        parameters = count_parameters(model)
        memory = memory_of(
            model,
            trainer.bare_model.config,
            shape,
            sharding,
            args.world_size,
            bf16=args.bf16,
            checkpointing=args.gradient_checkpointing,
            loss_chunk_size=args.loss_chunk_size,
            mask_form=args.mask_form,
            teacher=None if trainer.teacher is None else trainer.teacher.model,
        )
        return cls(parameters, args.global_batch_size, length, tokens, args.max_steps, sharding, memory)

    def table(self, title: str) -> str:
        """The numbers as lines of text."""
        lines = [title]
        for group, (count, trainable) in self.parameters.items():
            lines.append(f"  {group + ' parameters':<28}{count:>16,}   trained {trainable:,}")
        lines.append(f"  {'samples per step':<28}{self.samples:>16,}")
        if self.tokens_per_sample is not None:
            tokens = round(self.tokens_per_sample * self.samples)
            lines.append(f"  {'packed tokens per step':<28}{tokens:>16,}   {self.tokens_per_sample:,.0f} a sample")
        lines.append(f"  {'tokens at once, at most':<28}{self.largest:>16,}   of the largest micro-batch")
        lines.append(f"  {'steps':<28}{self.steps:>16,}")
        shared = "" if self.sharding == "none" else f", {self.sharding}"
        lines.append(f"  memory per process{shared} (estimate, without the vision tower's activations)")
        for name, size in self.memory.items():
            lines.append(f"    {name:<26}{size / GIB:>16.2f} GiB")
        lines.append(f"    {'in all':<26}{sum(self.memory.values()) / GIB:>16.2f} GiB")
        return "\n".join(lines)


def memory_of(
    model: nn.Module,
    config: Any,
    shape: tuple[int, int],
    sharding: str,
    num_processes: int,
    *,
    bf16: bool,
    checkpointing: bool,
    loss_chunk_size: int,
    mask_form: str,
    teacher: PreTrainedModel | None = None,
) -> dict[str, float]:
    """Bytes on each process by what they are for, at a micro-batch of `shape`, rows and columns."""
    memory = state_memory(model, sharding, num_processes)
    if teacher is not None:
        memory["teacher"] = sum(p.numel() * p.element_size() for p in teacher.parameters())
    if bf16 and sharding == "none":
        memory["weights in bfloat16"] = autocast_memory(model)
    itemsize = 2 if bf16 else 4
    memory |= activation_memory(config, math.prod(shape), itemsize, checkpointing)
    # Logits, their logarithms and gradients, in bfloat16 too; of a teacher the same, and the divergence.
    tensors = (4 if bf16 else 3) + (4 if teacher is not None else 0)
    memory["logits"] = 4 * loss_chunk_size * config.text_config.vocab_size * tensors
    memory["attention mask"] = mask_memory(config.text_config, mask_form, shape, itemsize, checkpointing)
    if teacher is not None:
        memory["attention mask"] += mask_memory(teacher.config.text_config, mask_form, shape, itemsize, True)
    return memory


def largest_batch(trainer: Any) -> tuple[int, int]:
    """Rows and columns of the largest micro-batch: of the longest chats, or of the first steps' full rows.

    Of a stream, whose chats are not known, as many full rows as a micro-batch has chats.
    """
    args, collator = trainer.args, trainer.data_collator
    multiple, row_length = collator.pad_to_multiple_of, collator.encoder.limits.max_length
    lengths = getattr(trainer.train_dataset, "lengths", None)
    if lengths is None:
        return args.per_device_train_batch_size, -(-row_length // multiple) * multiple
    if args.fill_rows:
        steps = itertools.islice(trainer.full_rows().steps(), STEPS_LOOKED_AT)
        batches = [[lengths[number] for number in share] for step in steps for shares in step for share in shares]
    else:
        batches = [sorted(lengths)[-args.per_device_train_batch_size :]]
    shapes = []
    for batch in batches:
        rows = [sum(batch[number] for number in row) for row in first_fit_decreasing(batch, row_length)]
        shapes.append((len(rows), -(-max(rows, default=1) // multiple) * multiple))
    return max(shapes, key=math.prod)


def mask_memory(text: Any, form: str, shape: tuple[int, int], itemsize: int, checkpointing: bool) -> float:
    """Bytes of the attention mask, and of what is made of it.

    A dense one has a byte per pair of tokens, and scaled dot-product attention makes numbers to add of it for each
    layer, which are kept for the backward pass unless the layer is computed again.
    """
    rows, columns = shape
    making = 10.0 * rows * columns * min(TILE, columns)
    if form == "flex":
        return making
    is_repeated = columns <= 2 * text.num_key_value_heads * text.head_dim  # see `attend_grouped`
    copies = text.num_attention_heads // text.num_key_value_heads if is_repeated else 1
    layers = 1 if checkpointing else text.num_hidden_layers
    return making + rows * columns**2 * (1.0 + copies * layers * itemsize)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters by group, all and trainable; under ZeRO-3 by their whole shapes."""
    counts = {group: [0, 0] for group in PARAMETER_GROUPS}
    for name, parameter in model.named_parameters():
        size = whole_size(parameter)
        counts[group_of(name)][0] += size
        counts[group_of(name)][1] += size * parameter.requires_grad
    return {group: (everything, trained) for group, (everything, trained) in counts.items()}


def whole_size(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, also in one that ZeRO-3 has split or bitsandbytes has packed."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel()


def sharding_of(trainer: Any) -> str:
    """The spread of weights, gradients and optimizer states over processes."""
    if trainer.is_fsdp_enabled:
        return "fsdp"
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return "none"


def state_memory(model: nn.Module, sharding: str, num_processes: int) -> dict[str, float]:
    """Bytes of weights, gradients and AdamW's two moments on one process.

    DeepSpeed keeps bfloat16 weights and gradients, and float32 master weights with the moments.
    """
    weights = gradients = moments = 0.0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        zero = sharding.startswith("zero")
        width = 2 if zero else parameter.element_size()
        weights += size * width
        if parameter.requires_grad:
            gradients += size * width
            moments += size * (12 if zero else 2 * width)
    # Stage 1 splits the optimizer's states, 2 the gradients too, 3 and FSDP the weights as well.
    split = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}[sharding]
    parts = {"weights": weights, "gradients": gradients, "optimizer states": moments}
    needed = {"weights": 3, "gradients": 2, "optimizer states": 1}
    return {name: size / num_processes if split >= needed[name] else size for name, size in parts.items()}


def autocast_memory(model: nn.Module) -> float:
    """Bytes of the bfloat16 copies that autocast keeps, until the end of a forward, of float32 matrices that learn."""
    matrices = (p for p in model.parameters() if p.requires_grad and p.ndim > 1 and p.element_size() == 4)
    return 2.0 * sum(matrix.numel() for matrix in matrices)


def activation_memory(config: Any, tokens: float, width: int, checkpointing: bool) -> dict[str, float]:
    """Bytes that a forward of `tokens` packed tokens keeps for its backward, language model only.

    Per token and layer: two residual inputs and their normed copies, queries, keys and values before and after norm and
    rotation, the attention's output, and four tensors of the gated MLP; `width` bytes a number. With checkpointing a
    layer keeps its input alone, and one layer at a time keeps all. The last norm keeps its input and its output.
    """
    text = config.text_config
    heads = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    layer = width * tokens * (6 * text.hidden_size + 4 * heads + 6 * keys + 4 * text.intermediate_size)
    state = width * tokens * text.hidden_size
    if checkpointing:
        return {"activations (checkpointed)": state * (text.num_hidden_layers + 2) + layer}
    return {"activations": layer * text.num_hidden_layers + 2 * state}
