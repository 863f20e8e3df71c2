"""Block-diffusion decoding as published decoders do it, and the rungs of a ladder from there to this engine.

It runs transformers' own Qwen3-VL modules, one prompt at a time, greedily. The lowest rung is the plain baseline: the
cache is concatenated in every layer at every step, every forward has a 4-D mask and the logits of all of its rows, the
prompt and each finished block have a forward of their own, and every decision is checked on the host. Each further
rung drops one of these; all give the same tokens.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from bard_vl.attention_bard_vl import ATTENTION_NAME, Slots
from bard_vl.compat_bard_vl import cache_argument
from contenders import Decoded, Task
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, Qwen3VLForConditionalGeneration
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

MASKLESS = "sdpa_without_causality"


def sdpa_without_causality(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention, which would take a missing mask for a causal one."""
    return sdpa_attention_forward(*args, **{**kwargs, "is_causal": False})


AttentionInterface.register(MASKLESS, sdpa_without_causality)
AttentionMaskInterface.register(MASKLESS, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class Rung:
    """The improvements of a decoder of the ladder over the plain baseline.

    Attributes:
        in_place: write keys and values into preallocated buffers instead of concatenating.
        maskless: attend without a mask where the window is one block; needs a model with `MASKLESS` attention.
        block_logits: logits of the block that is denoised alone, none of the prompt and of finished blocks.
        device_rule: decide without looking at values on the host; confidence from logsumexp, not a softmax.
        fused_prefill: encode the prompt together with the first step of the first block.
        fused_commit: encode a finished block together with the first step of the next.
        shared_heads: neither repeat keys and values for the heads that share them, nor mask a window of two blocks;
            needs a model with this package's attention.
    """

    name: str = "plain baseline"
    in_place: bool = False
    maskless: bool = False
    block_logits: bool = False
    device_rule: bool = False
    fused_prefill: bool = False
    fused_commit: bool = False
    shared_heads: bool = False

    @property
    def attention(self) -> str:
        """Attention implementation of the model that it needs."""
        return ATTENTION_NAME if self.shared_heads else MASKLESS if self.maskless else "sdpa"


_BETTER: tuple[dict[str, Any], ...] = (
    {"name": "+ in-place cache", "in_place": True},
    {"name": "+ no mask inside a block", "maskless": True},
    {"name": "+ logits of the block alone", "block_logits": True},
    {"name": "+ no host checks in a block", "device_rule": True},
    {"name": "+ prefill with the first step", "fused_prefill": True},
    {"name": "+ commit with the first step", "fused_commit": True},
    {"name": "+ heads that share keys and values", "shared_heads": True},
)
LADDER = tuple(accumulate(_BETTER, lambda rung, better: replace(rung, **better), initial=Rung()))


class InPlaceLayer(DynamicLayer):
    """Keys and values of one layer in buffers of `capacity` columns; cropping only moves the end."""

    def __init__(self, capacity: int):
        super().__init__()
        self.is_initialized = False
        self.capacity, self.length = capacity, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new columns behind the others; return all."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            room = [*key_states.shape[:2], self.capacity, key_states.shape[3]]
            self.keys, self.values = key_states.new_empty(room), value_states.new_empty(room)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Columns written."""
        return self.length

    def crop(self, minus_columns: int) -> None:
        """Forget the last columns; transformers 4.57 to 5.23 agree on a negative number alone."""
        self.length += minus_columns


class LadderDecoder:
    """One call: a prompt, and its response in blocks.

    Args:
        model: Qwen3-VL with the rung's attention.
        rung: what to do better than the plain baseline.
        task: settings.
        inputs: `input_ids` (1, length), and pixels and grids for its images and videos.
        positions: (4, 1, length) text, temporal, height and width position of the prompt.

    Attributes:
        forwards: forwards of the language model by kind, as in the engine's `num_forwards`.
        steps: denoising steps of each block.
    """

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        rung: Rung,
        task: Task,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
    ):
        self.model, self.rung, self.task = model, rung, task
        prompt, device = inputs["input_ids"], inputs["input_ids"].device
        self.visual_inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
        self.length, room = prompt.shape[1], task.num_blocks * task.block_size
        self.ids = pad(prompt, [0, room], value=task.mask_token_id)
        ahead = torch.arange(room, device=device)
        spatial = (positions[1:].max() + 1 + ahead).expand(3, 1, -1)
        text = (self.length + ahead).expand(1, 1, -1)
        self.positions = torch.cat([positions, torch.cat([text, spatial])], dim=-1)
        # The prompt is cut from its start, the response from its own.
        prompt_blocks = torch.arange(self.length, device=device) // task.block_size
        self.blocks = torch.cat([prompt_blocks, prompt_blocks[-1] + 1 + ahead // task.block_size])
        num_layers = model.config.text_config.num_hidden_layers
        capacity = self.length + room
        in_place = Cache(layers=[InPlaceLayer(capacity) for _ in range(num_layers)]) if rung.in_place else None
        self.cache = in_place or DynamicCache()
        self.num_encoded = 0  # columns of which the cache holds the final keys and values
        self.forwards: Counter[str] = Counter()
        self.steps: list[int] = []
        self.commit: Callable[[torch.Tensor, torch.Tensor, int, Task], bool]
        self.commit = commit_on_device if rung.device_rule else commit_on_host

    @torch.no_grad()
    def run(self) -> list[int]:
        """Decode up to an EOS or `max_new_tokens`; return the response, the EOS included."""
        size, eos = self.task.block_size, self.task.eos_token_id
        for block in range(self.task.num_blocks):
            start = self.length + block * size
            self.denoise(start)
            if (self.ids[0, start : start + size] == eos).any().item():
                break
        response = self.ids[0, self.length : start + size][: self.task.max_new_tokens].tolist()
        return response[: response.index(eos) + 1] if eos in response else response

    def denoise(self, start: int) -> None:
        """Decide the block in columns [start, start + block size); first encode what is not yet encoded before it."""
        size = self.task.block_size
        is_first = start == self.length
        behind = "prefill" if is_first else "commit"
        if not (self.rung.fused_prefill if is_first else self.rung.fused_commit):
            self.encode(start, behind)
            self.num_encoded = start
        block = self.ids[:, start : start + size]
        self.steps.append(0)
        finished = False
        while not finished:
            logits = self.encode(start + size, "denoise" if self.num_encoded == start else behind + "+denoise")
            self.cache.crop(-size)
            self.num_encoded = start
            finished = self.commit(block, logits[:, -size:], self.steps[-1], self.task)
            self.steps[-1] += 1

    def encode(self, end: int, kind: str) -> torch.Tensor:
        """Run the columns from the encoded ones to `end`; return their logits (1, columns or block, vocabulary)."""
        first, size = self.num_encoded, self.task.block_size
        self.forwards[kind] += 1
        before = end - first - size  # tokens of a finished block in the window
        unmasked = self.rung.maskless and first >= self.length and (self.rung.shared_heads or not before)
        parts = [(count, stop) for count, stop in ((before, end - size), (size, end)) if count]
        settings = {}
        if unmasked and self.rung.shared_heads:
            counts, lengths = (list(column) for column in zip(*parts, strict=True))
            settings["slots"] = Slots.of([0] * len(parts), counts, lengths, self.ids.device)
        hidden = self.model.model(
            input_ids=self.ids[:, first:end],
            attention_mask=None if unmasked else self.mask(first, end),
            position_ids=self.positions[:, :, first:end],
            use_cache=True,
            **cache_argument(self.cache),
            **({} if first else self.visual_inputs),
            **settings,
        )[0]
        if self.rung.block_logits:
            hidden = hidden[:, -size:] if kind.endswith("denoise") else hidden[:, :0]
        return self.model.lm_head(hidden)

    def mask(self, first: int, end: int) -> torch.Tensor:
        """(1, 1, queries, keys) bool: a token sees its own and earlier blocks."""
        return (self.blocks[None, :end] <= self.blocks[first:end, None])[None, None]


def commit_on_host(block: torch.Tensor, logits: torch.Tensor, step: int, task: Task) -> bool:
    """Decide tokens of `block` (1, size) in place, as published decoders do; say whether none is left."""
    masked = block == task.mask_token_id
    probabilities = logits.softmax(-1)
    probabilities[..., task.mask_token_id] = 0
    confidence, tokens = probabilities.max(-1)
    chosen = masked & (confidence > task.confidence_threshold)
    if task.remasking_strategy == "low_confidence_static" or chosen.sum().item() < task.quota(step):
        best = confidence.masked_fill(~masked, -1).sort(dim=-1, descending=True, stable=True).indices
        chosen = masked & torch.zeros_like(masked).index_fill(1, best[0, : task.quota(step)], True)
    block[chosen] = tokens[chosen]
    return not (block == task.mask_token_id).any().item()


def commit_on_device(block: torch.Tensor, logits: torch.Tensor, step: int, task: Task) -> bool:
    """The same without a branch on values; only a rule whose number of steps is open looks whether any is left."""
    masked = block == task.mask_token_id
    normaliser = logits.float().logsumexp(-1)
    logits[..., task.mask_token_id] = float("-inf")
    best, tokens = logits.max(-1)
    confidence = (best.float() - normaliser).exp()
    order = confidence.masked_fill(~masked, -1).sort(dim=-1, descending=True, stable=True).indices
    chosen = order.argsort(dim=-1) < task.quota(step)
    if task.remasking_strategy == "low_confidence_dynamic":
        chosen |= confidence > task.confidence_threshold
    block.copy_(torch.where(masked & chosen, tokens, block))
    if task.remasking_strategy == "low_confidence_static":
        return step + 1 == task.denoising_steps
    return not (block == task.mask_token_id).any().item()


class LadderContender:
    """A rung of the ladder, one prompt at a time."""

    is_block_diffusion, is_in_process, is_batched, num_warm_ups, is_optional = True, True, False, 1, False

    def __init__(self, model: Qwen3VLForConditionalGeneration, rung: Rung):
        self.name, self.model, self.rung, self.dtype = rung.name, model, rung, model.dtype

    def decode(self, prompts: list[torch.Tensor], task: Task) -> Decoded:
        """See `Contender`."""
        decoded = Decoded([], Counter())
        for prompt in prompts:
            positions = torch.arange(len(prompt), device=prompt.device).expand(4, 1, -1)
            decoder = LadderDecoder(self.model, self.rung, task, {"input_ids": prompt[None]}, positions)
            decoded.tokens.append(decoder.run())
            decoded.forwards += decoder.forwards
        return decoded
