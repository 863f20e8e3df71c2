"""What is compared, behind one call: prompts in, tokens and forwards out."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from bard_vl import BardVLForConditionalGeneration
from plain_decoder import LADDER, LadderDecoder, Rung, Task
from shapes import stock_twin
from transformers import CompileConfig, Qwen3VLForConditionalGeneration

GROUPS = ("plain", "ladder", "engine", "qwen")


@dataclass
class Decoded:
    """Response ids of each prompt, and forwards of the language model by kind, in total."""

    tokens: list[list[int]]
    forwards: Counter[str]


class Contender(Protocol):
    """A way to decode.

    Attributes:
        name: what tables call it.
        is_block_diffusion: whether it is to give the engine's tokens.
        is_batched: whether it decodes all prompts together.
        is_optional: whether it may be impossible here, on this device or version.
        dtype: of the weights.
    """

    name: str
    is_block_diffusion: bool
    is_batched: bool
    is_optional: bool
    dtype: torch.dtype

    def decode(self, prompts: list[torch.Tensor], task: Task, first_block_only: bool = False) -> Decoded:
        """Decode 1-D prompts; with `first_block_only` a call for whole responses that stops after the first block."""


class LadderContender:
    """A rung of the ladder, one prompt at a time."""

    is_block_diffusion, is_batched, is_optional = True, False, False

    def __init__(self, model: Qwen3VLForConditionalGeneration, rung: Rung):
        self.name, self.model, self.rung, self.dtype = rung.name, model, rung, model.dtype

    def decode(self, prompts: list[torch.Tensor], task: Task, first_block_only: bool = False) -> Decoded:
        """See `Contender`."""
        decoded = Decoded([], Counter())
        for prompt in prompts:
            positions = torch.arange(len(prompt), device=prompt.device).expand(4, 1, -1)
            decoder = LadderDecoder(self.model, self.rung, task, {"input_ids": prompt[None]}, positions)
            decoded.tokens.append(decoder.run(max_blocks=1 if first_block_only else None))
            decoded.forwards += decoder.forwards
        return decoded


class EngineContender:
    """`generate` of this package; `settings` are further arguments of it."""

    is_block_diffusion = True

    def __init__(self, name: str, model: BardVLForConditionalGeneration, is_batched: bool, **settings: Any):
        self.name, self.model, self.is_batched, self.settings = name, model, is_batched, settings
        self.dtype, self.is_optional = model.dtype, "cache_implementation" in settings

    def decode(self, prompts: list[torch.Tensor], task: Task, first_block_only: bool = False) -> Decoded:
        """See `Contender`."""
        decoded = Decoded([], Counter())
        for batch in [prompts] if self.is_batched else [[prompt] for prompt in prompts]:
            output = self.model.generate(
                **collate(batch),
                **vars(task),
                **self.settings,
                return_dict_in_generate=True,
                # A smaller `max_new_tokens` would stop there too, but change the shapes of a compiled model. With a
                # criterion the engine looks after every step, whatever the `check_interval`: at most that many early.
                stopping_criteria=[_stop] if first_block_only else None,
            )
            width = max(len(prompt) for prompt in batch)
            decoded.tokens += [row[width:].tolist() for row in output.sequences]
            decoded.forwards += Counter(output.num_forwards)
        return decoded


class AutoregressiveContender:
    """Qwen3-VL of the same weights by transformers' own `generate`, token by token; `settings` are arguments of it."""

    is_block_diffusion, is_batched = False, True

    def __init__(self, name: str, model: Qwen3VLForConditionalGeneration, **settings: Any):
        self.name, self.model, self.settings = name, model, settings
        self.dtype, self.is_optional = model.dtype, "cache_implementation" in settings

    def decode(self, prompts: list[torch.Tensor], task: Task, first_block_only: bool = False) -> Decoded:
        """See `Contender`; the first block is the first `block_size` tokens."""
        width = max(len(prompt) for prompt in prompts)
        sequences = self.model.generate(
            **collate(prompts),
            **self.settings,
            max_new_tokens=task.max_new_tokens,
            stopping_criteria=[_StopAt(width + task.block_size)] if first_block_only else None,
        )
        tokens = [row[width:].tolist() for row in sequences]
        return Decoded(tokens, Counter({"prefill": 1, "decode": len(tokens[0]) - 1}))


class _StopAt:
    def __init__(self, length: int):
        self.length = length

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= self.length, dtype=torch.bool, device=ids.device)


def _stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return torch.ones(len(ids), dtype=torch.bool, device=ids.device)


def collate(prompts: list[torch.Tensor]) -> dict[str, Any]:
    """`input_ids` and `attention_mask` (batch, longest), padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    padded = [torch.nn.functional.pad(prompt, [width - len(prompt), 0]) for prompt in prompts]
    real = [torch.nn.functional.pad(torch.ones_like(prompt), [width - len(prompt), 0]) for prompt in prompts]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(real)}


def contenders(
    model: BardVLForConditionalGeneration, groups: list[str], batch: int, compiled: bool, interval: int | None = None
) -> list[Contender]:
    """Those of `groups`, the plain baseline first.

    Args:
        model: of the shape that is measured.
        groups: of `GROUPS`. `ladder` is for one prompt; with several, engine and baseline also go one by one.
        batch: number of prompts.
        compiled: add static caches with compilation.
        interval: the engine's `check_interval`, None for its default.
    """
    chosen: list[Contender] = []
    twins = {rung.attention: stock_twin(model, rung.attention) for rung in LADDER}
    for place, rung in enumerate(LADDER):
        if "plain" in groups if place == 0 else "ladder" in groups and batch == 1:
            chosen.append(LadderContender(twins[rung.attention], rung))
    if batch > 1 and chosen:
        chosen[0].name += ", one by one"
    engine = {} if interval is None else {"check_interval": interval}
    if "engine" in groups:
        if batch > 1:
            chosen.append(EngineContender("this engine, one by one", model, is_batched=False, **engine))
        chosen.append(EngineContender("this engine", model, is_batched=True, **engine))
        if compiled:
            static = {**engine, "cache_implementation": "static"}
            chosen.append(EngineContender("this engine, static and compiled", model, is_batched=True, **static))
    if "qwen" in groups:
        chosen.append(AutoregressiveContender("Qwen3-VL, eager", twins["sdpa"]))
        if compiled:
            chosen.append(
                AutoregressiveContender(
                    "Qwen3-VL, static and compiled",
                    stock_twin(model, "sdpa"),
                    cache_implementation="static",
                    compile_config=_compile_everywhere(),
                )
            )
    return chosen


def _compile_everywhere() -> CompileConfig:
    config = CompileConfig()
    config._compile_all_devices = True  # transformers compiles by itself on accelerators alone
    return config
