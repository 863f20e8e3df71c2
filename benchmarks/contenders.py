"""The models compared, behind one call: prompts in, tokens and forwards out. By public calls of any release."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from bard_vl import BardVLForConditionalGeneration
from shapes import Shape
from transformers import CompileConfig, Qwen3VLForConditionalGeneration

MOST_OFFSET = 7  # tokens that a prompt may be longer or shorter in another round


@dataclass(frozen=True)
class Task:
    """The task to decode: the names and defaults of the reference's `generate`."""

    max_new_tokens: int = 256
    block_size: int = 4
    denoising_steps: int = 4
    remasking_strategy: str = "low_confidence_dynamic"
    confidence_threshold: float = 0.9
    mask_token_id: int = 151_671
    eos_token_id: int = 151_645

    def quota(self, step: int) -> int:
        """Tokens that a step commits at least."""
        return self.block_size // self.denoising_steps + (step < self.block_size % self.denoising_steps)

    @property
    def num_blocks(self) -> int:
        """Blocks of a whole response."""
        return -(-self.max_new_tokens // self.block_size)

    @property
    def first_block(self) -> "Task":
        """The same, but it ends with the first block."""
        return replace(self, max_new_tokens=self.block_size)


def static_task(shape: Shape, max_new_tokens: int, block_size: int, steps: int) -> Task:
    """Every step commits block size / steps tokens, and no response ends early."""
    return Task(
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        denoising_steps=steps,
        remasking_strategy="low_confidence_static",
        mask_token_id=shape.mask_token_id,
        eos_token_id=shape.eos_token_id,
    )


@dataclass
class Decoded:
    """The result of a call.

    Attributes:
        tokens: response ids of each prompt.
        forwards: of the language model by kind, in total.
        seconds: that it took, if someone looked at the clock.
    """

    tokens: list[list[int]]
    forwards: Counter[str]
    seconds: float = float("nan")


class Contender(Protocol):
    """A way to decode.

    Attributes:
        name: what tables call it.
        is_block_diffusion: whether it is to give the engine's tokens.
        is_batched: whether it decodes all prompts together.
        num_warm_ups: rounds before the first that is timed.
        is_optional: whether it may be impossible here, on this device or version.
        dtype: of the weights.
        is_in_process: whether its memory is this process's.
    """

    name: str
    is_block_diffusion: bool
    is_batched: bool
    num_warm_ups: int
    is_optional: bool
    dtype: torch.dtype
    is_in_process: bool

    def decode(self, prompts: list[torch.Tensor], task: Task) -> Decoded:
        """Decode 1-D prompts."""


class EngineContender:
    """`generate` of this package; `settings` are further arguments of it."""

    is_block_diffusion = is_in_process = True

    def __init__(self, name: str, model: BardVLForConditionalGeneration, is_batched: bool, **settings: Any):
        self.name, self.model, self.is_batched, self.settings = name, model, is_batched, settings
        self.dtype, self.is_optional = model.dtype, settings.get("cache_implementation") not in (None, "dynamic")
        # Compilation and the recording of graphs take two rounds.
        self.num_warm_ups = 2 if self.is_optional or model.device.type == "cuda" else 1

    def decode(self, prompts: list[torch.Tensor], task: Task) -> Decoded:
        """See `Contender`."""
        decoded = Decoded([], Counter())
        for batch in [prompts] if self.is_batched else [[prompt] for prompt in prompts]:
            output = self.model.generate(**collate(batch), **vars(task), **self.settings, return_dict_in_generate=True)
            width = max(len(prompt) for prompt in batch)
            decoded.tokens += [row[width:].tolist() for row in output.sequences]
            decoded.forwards += Counter(output.num_forwards)
        return decoded


class AutoregressiveContender:
    """Qwen3-VL of the same weights by transformers' own `generate`, token by token; `settings` are arguments of it."""

    is_block_diffusion, is_batched, is_in_process = False, True, True

    def __init__(self, name: str, model: Qwen3VLForConditionalGeneration, **settings: Any):
        self.name, self.model, self.settings = name, model, settings
        self.dtype, self.is_optional = model.dtype, "cache_implementation" in settings
        self.num_warm_ups = 2 if self.is_optional else 1

    def decode(self, prompts: list[torch.Tensor], task: Task) -> Decoded:
        """See `Contender`; the first block is the first `block_size` tokens."""
        width = max(len(prompt) for prompt in prompts)
        sequences = self.model.generate(**collate(prompts), **self.settings, max_new_tokens=task.max_new_tokens)
        tokens = [row[width:].tolist() for row in sequences]
        return Decoded(tokens, Counter({"prefill": 1, "decode": len(tokens[0]) - 1}))


def compile_everywhere() -> CompileConfig:
    """Compilation for `AutoregressiveContender`, which transformers turns on by itself on accelerators alone."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def collate(prompts: list[torch.Tensor]) -> dict[str, Any]:
    """`input_ids` and `attention_mask` (batch, longest), padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    padded = [torch.nn.functional.pad(prompt, [width - len(prompt), 0]) for prompt in prompts]
    real = [torch.nn.functional.pad(torch.ones_like(prompt), [width - len(prompt), 0]) for prompt in prompts]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(real)}


def make_prompts(lengths: list[int], shape: Shape, seed: int, device: torch.device) -> list[torch.Tensor]:
    """1-D prompts of random ordinary ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(shape.num_prompt_ids, (length,), generator=generator).to(device) for length in lengths]


def rounds_of_prompts(
    lengths: list[int], shape: Shape, seed: int, device: torch.device
) -> Callable[[int], list[torch.Tensor]]:
    """Prompts for each round, of about these lengths: others than in the rounds before, and of other lengths.

    Otherwise an engine's stores per length or per prompt would be filled when it is timed; users find them empty.
    """

    def prompts(number: int) -> list[torch.Tensor]:
        offset = 4 * number % (2 * MOST_OFFSET + 1) - MOST_OFFSET  # 15 rounds before a length comes again
        return make_prompts([max(length + offset, 1) for length in lengths], shape, 1000 * seed + number + 100, device)

    return prompts
