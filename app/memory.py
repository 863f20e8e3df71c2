"""The memory of a call of `generate`, known before it: weights, cache, activations; and what would fit.

The cache is counted exactly. Activations are counted as the tensors that are alive together at the widest moments of
the code; allocators, kernels' own workspaces and compiled graphs are not. With transformers 5.23, peaks measured on a
CPU are within `TOLERANCE` of the estimate; older lines take less for pictures in bfloat16.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..compat_bard_vl import attention_of
from ..generation_config_bard_vl import DecodingSettings
from ..inputs_bard_vl import PromptSize, pixel_advice
from ..recording_bard_vl import COLUMNS
from .quantization import bytes_of

TOLERANCE = 1.25
SUGGESTED_CHUNK = 1024  # tokens
TABLE_BYTES = 8 + 4 * 8 + 8 + 4  # of a column of a row: id, positions, block, confidence


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a call of `generate` takes.

    Attributes:
        weights: parameters and buffers of the model.
        cache: keys and values of prompt and response, for responses of full length.
        vision: highest use beside the weights while images and videos are encoded.
        prefill: while prompts are encoded; their cache and the visual features included.
        decode: while responses are written; the cache included.
        prompt_tokens: of the longest row.
        visual_tokens: of all rows.
        new_tokens: room for each response, in whole blocks.
    """

    weights: int
    cache: int
    vision: int
    prefill: int
    decode: int
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int

    @property
    def working(self) -> int:
        """Highest use beside the weights."""
        return max(self.vision, self.prefill, self.decode)

    @property
    def total(self) -> int:
        """Weights and working memory."""
        return self.weights + self.working

    def as_dict(self) -> dict[str, int]:
        """Every number by name."""
        return {**vars(self), "working": self.working, "total": self.total}


def estimate_memory(model: Any, inputs: Any, generation_config: Any = None, **settings: Any) -> MemoryEstimate:
    """The memory of `model.generate(inputs, generation_config, **settings)`, if no cache is passed.

    Args:
        model: a Bard-VL model; one on the meta device does, so that no weights need to be loaded.
        inputs: the processor's output.
        generation_config, settings: as for `generate`.

    Raises:
        ValueError: `generate` would refuse the prompt or a setting.
    """
    return estimate(model, *read_prompt(model, inputs, generation_config, **settings))


def read_prompt(
    model: Any, inputs: Any, generation_config: Any = None, **settings: Any
) -> tuple[PromptSize, DecodingSettings]:
    """Check and measure a prompt, and resolve the settings, as `generate` does; `ValueError` where it would refuse.

    Their `max_new_tokens` is that of the row with the most room.
    """
    call = model.read_call(inputs, generation_config, settings, warn=False)
    return PromptSize.of(model.config, call.prompt), call.settings


def estimate(model: Any, size: PromptSize, settings: DecodingSettings, weights: int | None = None) -> MemoryEstimate:
    """The same for a prompt already measured and settings already resolved; `weights` if they are known in bytes."""
    merged = model.config.vision_config.spatial_merge_size**2
    return MemoryEstimate(
        weights=weight_bytes(model) if weights is None else weights,
        cache=cache_bytes(model, size, settings),
        vision=vision_bytes(model, size),
        prefill=prefill_bytes(model, size, settings),
        decode=decode_bytes(model, size, settings),
        prompt_tokens=max(size.lengths),
        visual_tokens=sum(item.patches for item in size.items) // merged,
        new_tokens=num_blocks(settings) * settings.block_size,
    )


def weight_bytes(model: Any) -> int:
    """Parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    if model.config.tie_word_embeddings:  # not yet tied on the meta device of some versions
        tensors.pop(id(model.lm_head.weight), None)
        tensors[id(model.get_input_embeddings().weight)] = model.get_input_embeddings().weight
    return sum(map(bytes_of, tensors.values()))


def working_bytes(model: Any, size: PromptSize, settings: DecodingSettings) -> int:
    """`MemoryEstimate.working`, of the shapes alone."""
    stages = vision_bytes(model, size), prefill_bytes(model, size, settings), decode_bytes(model, size, settings)
    return max(stages)


def certain_bytes(model: Any, size: PromptSize, settings: DecodingSettings) -> int:
    """A lower bound of `working_bytes`: every response ends in its first block.

    A static cache is allocated in full at once.
    """
    shortest = settings
    if settings.cache_implementation != "static":
        shortest = replace(settings, max_new_tokens=min(settings.max_new_tokens, settings.block_size))
    further = table_bytes(size, settings) - table_bytes(size, shortest)
    return working_bytes(model, size, shortest) + further


def num_blocks(settings: DecodingSettings) -> int:
    """Blocks of the longest response."""
    return -(-settings.max_new_tokens // settings.block_size)


def table_bytes(size: PromptSize, settings: DecodingSettings) -> int:
    """Tokens, positions, blocks and confidences of prompts and full responses."""
    rows = len(size.lengths) * settings.num_return_sequences
    return rows * TABLE_BYTES * (max(size.lengths) + (num_blocks(settings) + 1) * settings.block_size)


def cache_columns(longest: int, settings: DecodingSettings) -> int:
    """Columns allocated for a response of full length: what is needed, or half more when it grows, up to the most."""
    block, blocks = settings.block_size, num_blocks(settings)
    most = longest + (blocks + 1) * block
    if settings.cache_implementation == "static":
        return -(-most // COLUMNS) * COLUMNS
    columns, first, chunk = 0, longest + block, settings.prefill_chunk_size
    while columns < longest + blocks * block:
        if chunk and columns < longest - chunk:
            end = (columns // chunk + 1) * chunk
        else:
            end = first + max(columns - longest, 0) // block * block
        columns = min(max(end, columns + columns // 2), most)
    return columns


def cache_bytes(model: Any, size: PromptSize, settings: DecodingSettings) -> int:
    """Keys and values of every layer and row."""
    rows = len(size.lengths) * settings.num_return_sequences
    return rows * cache_columns(max(size.lengths), settings) * column_bytes(model)


def column_bytes(model: Any) -> int:
    """Keys and values of one token."""
    text = model.config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * element_size(model)


def vision_bytes(model: Any, size: PromptSize) -> int:
    """Activations of the vision tower, which encodes all items together."""
    vision, element = model.config.vision_config, element_size(model)
    hidden, patches = vision.hidden_size, sum(item.patches for item in size.items)
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    # Positions and rotations are computed in float32, of copies where the model has another dtype.
    copies = 4 * (element < 4)
    positions = 4 * hidden * (element + 4 + copies) + hidden * element  # four neighbours of each, and their weights
    rotation = hidden * (5 * element + 4 * 4 + 2 * copies)
    attention = 0
    if attention_of(vision) == "eager":  # products and softmax; a frame sees itself alone
        frame = max((item.height * item.width for item in size.items), default=0)
        attention = vision.num_heads * frame**2 * softmax_bytes(element)
    mlp = (4 * hidden + 2 * vision.intermediate_size) * element
    given = pixels * (4 + (element if copies else 0))
    features = (1 + len(vision.deepstack_visual_indexes)) * vision.out_hidden_size * element
    return attention + patches * (given + max(positions, rotation, mlp) + features // vision.spatial_merge_size**2)


def prefill_bytes(model: Any, size: PromptSize, settings: DecodingSettings) -> int:
    """Cache and activations of the widest window of prompt tokens, and the features of all images and videos."""
    text, vision = model.config.text_config, model.config.vision_config
    rows, chunk, end = len(size.lengths), settings.prefill_chunk_size, max(size.lengths) + settings.block_size
    width = end - size.first if chunk is None else min(end - size.first, chunk + settings.block_size)
    tokens = sum(item.patches for item in size.items) // vision.spatial_merge_size**2
    features = 2 * tokens * (1 + len(vision.deepstack_visual_indexes)) * text.hidden_size * element_size(model)
    return rows * (end * column_bytes(model) + window_bytes(model, width, end)) + features


def decode_bytes(model: Any, size: PromptSize, settings: DecodingSettings) -> int:
    """The whole cache, and the larger of a window of blocks and the scores of those chosen at once."""
    block, vocabulary = settings.block_size, model.config.text_config.vocab_size
    end = max(size.lengths) + (num_blocks(settings) + 1) * block
    scores = max(settings.concurrent_blocks - 1, 1) * block * vocabulary * choice_bytes(settings, element_size(model))
    rows = len(size.lengths) * settings.num_return_sequences
    held = cache_bytes(model, size, settings) + table_bytes(size, settings)
    return held + rows * max(scores, window_bytes(model, (1 + settings.concurrent_blocks) * block, end))


def choice_bytes(settings: DecodingSettings, element: int) -> int:
    """Bytes per position and entry of the vocabulary while a token is chosen (`Chooser.choose`)."""
    needed = softmax_bytes(element)  # the normaliser
    if settings.samples:  # logits and those without the mask token; relative to the largest, weights, noise, quotient
        needed = 2 * element + 4 * 4
        if settings.sampling.top_p < 1:  # in order, their places, probabilities, sums, and those less the probabilities
            needed += 8 + 3 * 4 + 1
    if settings.remasking_strategy == "entropy_bounded":  # logits, their log-probabilities, the products twice
        needed = max(needed, element + 3 * 4)
    return needed


def softmax_bytes(element: int) -> int:
    """Bytes per score of a softmax in float32: the score, its copy in float32 if it is smaller, the result."""
    return element + 4 * (element < 4) + 4


def window_bytes(model: Any, width: int, end: int) -> int:
    """Activations of a text layer for a window of `width` tokens that sees the columns up to `end`."""
    text, element = model.config.text_config, element_size(model)
    heads, groups = text.num_attention_heads, text.num_attention_heads // text.num_key_value_heads
    states = 4 * text.hidden_size * element + end + 2 * text.head_dim * element  # `end` of them of the boolean mask
    mlp = 3 * text.intermediate_size * element
    attention = 2 * heads * text.head_dim * element
    repeated = 2 * heads * text.head_dim * end * element // width  # keys and values, for each head of a group
    if attention_of(text) == "eager":  # products and softmax
        attention += heads * end * softmax_bytes(element) + repeated
    elif attention_of(text) == "sdpa":  # the mask as numbers
        attention += end * (1 + element) + repeated
    else:  # the mask repeated for each head of a group, or keys and values where that is less
        attention += min(groups * end * (1 + element), end * (1 + element) + repeated)
    return width * (states + max(mlp, attention))


def element_size(model: Any) -> int:
    """Bytes of a number in activations and cache."""
    return model.get_input_embeddings().weight.element_size()


def check_fits(
    model: Any,
    size: PromptSize,
    settings: DecodingSettings,
    device: torch.device,
    free: int | None,
    weights: int = 0,
    smaller: tuple[tuple[str, int], ...] = (),
) -> None:
    """Raise `ValueError` if a call surely needs more than `free` bytes.

    Compares the lower bound, because responses may end early.

    Args:
        model, size, settings: as of `estimate`.
        device: named in the error.
        free: None is not known, and passes.
        weights: bytes that are still to be read.
        smaller: other ways to load them, as advice and bytes; the first that fits is named.
    """
    least = certain_bytes(model, size, settings)
    if free is None or weights + least <= TOLERANCE * free:
        return

    def fits(size: PromptSize, **changes: Any) -> bool:
        return weights + certain_bytes(model, size, replace(settings, **changes)) <= free / TOLERANCE

    found = estimate(model, size, settings, weights)
    lighter = next((words for words, total in smaller if total + least <= free / TOLERANCE), None)
    advice = pixel_advice(size, model.config.vision_config, fits) if lighter is None or weights < free else ""
    advice += f"; or {lighter}" if lighter else ""
    chunk = max(SUGGESTED_CHUNK // settings.block_size, 1) * settings.block_size
    if settings.prefill_chunk_size is None and fits(size, prefill_chunk_size=chunk):
        advice += f"; or set `prefill_chunk_size` to {chunk}"
    if settings.max_new_tokens > settings.block_size and fits(size, max_new_tokens=settings.block_size):
        advice += f"; or lower `max_new_tokens`, which is {settings.max_new_tokens}"
    if len(size.lengths) > 1 and all(fits(size.row(number)) for number in range(len(size.lengths))):
        advice += f"; or give fewer than {len(size.lengths)} prompts at once"
    parts = [f"{readable(weights)} of weights"] if weights else []
    parts += [f"{readable(found.vision)} to encode images and videos"] if size.items else []
    parts += [f"{readable(found.prefill)} to encode the prompt", f"{readable(found.decode)} to write the response"]
    visual = f", {found.visual_tokens} of images and videos" if size.items else ""
    raise ValueError(
        f"a prompt of {found.prompt_tokens} tokens{visual} needs about {readable(weights + found.working)} at most "
        f"({', '.join(parts)}); {device} has {readable(free)} free{advice}"
    )


def readable(size: int) -> str:
    """Bytes in a unit that people read, for instance `1.2 GB`."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if value >= 99.5 or units[0] == "B" else f"{value:.2g} {units[0]}"
