"""Inputs: prompts checked before any compute, and realigned to column 0; images and videos as one feature table.

Inside the package a batch is padded on the right: then column and text position agree, and block edges of all rows are
in the same columns.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .cache_bard_vl import fingerprint

logger = logging.get_logger(__name__)

IGNORED_INPUTS = ("labels", "mm_token_type_ids", "num_items_in_batch", "trust_remote_code")  # whatever their value
NEUTRAL_ARGUMENTS: dict[str, Any] = {
    "synced_gpus": False,
    "use_model_defaults": True,
    "output_router_logits": False,
    "generation_mode": "text",  # of `transformers serve`
    "return_legacy_cache": False,
}
INTEGERS = (torch.int64, torch.int32, torch.int16)


@dataclass(frozen=True)
class MediaKind:
    """A row of the table of what a prompt may show.

    Attributes:
        name: the kind's, as in an error's message and in the config's `<name>_token_id`.
        pixels: the argument with the patches, (patches, size).
        grids: the argument with the frames, height and width of every item in patches, (items, 3).
        part: what one run of placeholder tokens stands for.
        one: an item in words.
        has_frames: whether items have frames in time, each with a run of placeholder tokens of its own.
    """

    name: str
    pixels: str
    grids: str
    part: str
    one: str
    has_frames: bool

    def token_id(self, config: Any) -> int:
        """The id of its placeholder tokens."""
        return getattr(config, f"{self.name}_token_id")


MEDIA_KINDS = (
    MediaKind("image", "pixel_values", "image_grid_thw", "image", "an image", False),
    MediaKind("video", "pixel_values_videos", "video_grid_thw", "frame of a video", "a video", True),
)  # in the order of their features
VISUAL_INPUTS = tuple(name for kind in MEDIA_KINDS for name in (kind.pixels, kind.grids))


@dataclass
class VisualFeatures:
    """Image and video features, and where they belong in a batch of prompts.

    Attributes:
        index: (batch, length) row of the features for each visual token, -1 for other tokens.
        embeds: (features, hidden) input embeddings.
        deepstack: per deepstack layer, (features, hidden) additions.
    """

    index: torch.Tensor
    embeds: torch.Tensor
    deepstack: list[torch.Tensor]

    def show(self, embeds: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Put the features in the place of the tokens that show them.

        Args:
            embeds: (batch, length, hidden) input embeddings.

        Returns:
            The embeddings, and the text model's arguments for the deepstack features.
        """
        is_visual = self.index >= 0
        chosen = self.index[is_visual].to(self.embeds.device)
        shown = self.embeds[chosen].to(embeds.device, embeds.dtype)
        embeds = embeds.masked_scatter(is_visual[..., None].to(embeds.device), shown)
        return embeds, {
            "visual_pos_masks": is_visual,
            "deepstack_visual_embeds": [layer[chosen] for layer in self.deepstack],
        }


@dataclass
class Prompt:
    """A batch of prompts from column 0 on.

    Attributes:
        input_ids: (batch, longest prompt), padded on the right.
        lengths: (batch,) tokens of each row; `host_lengths` the same as a list.
        positions: (3, batch, longest prompt) temporal, height and width positions of multimodal RoPE.
        next_position: (batch,) position of the first response token, the same in all three components.
        visual_inputs: pixels and grids as the processor made them.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    host_lengths: list[int]
    positions: torch.Tensor
    next_position: torch.Tensor
    visual_inputs: dict[str, torch.Tensor]

    @classmethod
    def realign(
        cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor, visual_inputs: Any
    ) -> "Prompt":
        """Move left-padded rows (batch, length) to column 0; `positions` is (3, batch, length)."""
        lengths = attention_mask.long().sum(-1)
        length = input_ids.shape[1]
        columns = torch.arange(length, device=input_ids.device)[None] + (length - lengths)[:, None]
        source = columns.clamp(max=length - 1)
        real = attention_mask.bool()
        return cls(
            # What pads on the right must be no visual token, which the last real token may be.
            input_ids=input_ids.gather(1, source).masked_fill(columns >= length, 0),
            lengths=lengths,
            host_lengths=lengths.tolist(),
            positions=positions.gather(2, source.expand_as(positions)),
            next_position=positions.amax(0).masked_fill(~real, 0).amax(-1) + 1,
            visual_inputs=visual_inputs,
        )

    def contents(self, config: Any) -> list[torch.Tensor]:
        """Per row, the CPU tensor of ids with every visual token replaced by its image's or video's fingerprint."""
        contents = self.input_ids.cpu().clone()
        in_prompt = torch.arange(contents.shape[1])[None] < self.lengths.cpu()[:, None]
        for token_id, pixels, grids, counts in visual_items(config, self.visual_inputs):
            patches = grids.prod(-1).tolist()
            prints = [fingerprint(p, g) for p, g in zip(pixels.split(patches), grids, strict=True)]
            contents[in_prompt & (contents == token_id)] = torch.tensor(prints).repeat_interleave(counts.cpu())
        return [row[:length] for row, length in zip(contents, self.host_lengths, strict=True)]


def visual_items(
    config: Any, visual_inputs: Mapping[str, torch.Tensor | None]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Images, then videos, as (token id, pixels (patches, size), grids (items, 3), tokens per item (items,))."""
    merged = config.vision_config.spatial_merge_size**2
    for kind in MEDIA_KINDS:
        pixels, grids = visual_inputs.get(kind.pixels), visual_inputs.get(kind.grids)
        if pixels is not None and grids is not None:
            yield kind.token_id(config), pixels, grids, grids.prod(-1) // merged


def grids_of(visual_inputs: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """The grids of every kind, None for one that is not there."""
    return {kind.grids: visual_inputs.get(kind.grids) for kind in MEDIA_KINDS}


@dataclass(frozen=True)
class VisualItem:
    """An image or a video of a prompt: its grid in patches, and the row that it belongs to."""

    frames: int
    height: int
    width: int
    kind: MediaKind
    row: int

    @property
    def patches(self) -> int:
        """Patches that the vision tower encodes; `spatial_merge_size` ** 2 of them make a token."""
        return self.frames * self.height * self.width

    def within(self, max_pixels: int, vision_config: Any) -> "VisualItem":
        """The item as the processor would have made it under a limit of pixels, of a video in all its frames."""
        patch, merge = vision_config.patch_size, vision_config.spatial_merge_size
        frames = self.frames * vision_config.temporal_patch_size if self.kind.has_frames else 1
        pixels = frames * self.height * self.width * patch**2
        if pixels <= max_pixels:
            return self
        shrink = math.sqrt(max_pixels / pixels) / merge
        sides = (max(math.floor(side * shrink), 1) * merge for side in (self.height, self.width))
        return replace(self, **dict(zip(("height", "width"), sides, strict=True)))


@dataclass(frozen=True)
class PromptSize:
    """The sizes of a batch of prompts on which its memory depends.

    Attributes:
        lengths: tokens of each row.
        positions: position of each row's first response token.
        items: images and videos.
        first: column that encoding begins at; a cache holds those before it.
    """

    lengths: tuple[int, ...]
    positions: tuple[int, ...]
    items: tuple[VisualItem, ...]
    first: int = 0

    @classmethod
    def of(cls, config: Any, prompt: Prompt, first: int = 0) -> "PromptSize":
        """The size of a realigned `Prompt`, with the items that have a token in column `first` or later."""
        merged, items = config.vision_config.spatial_merge_size**2, []
        for kind in MEDIA_KINDS:
            grids = prompt.visual_inputs.get(kind.grids)
            tokens = (prompt.input_ids == kind.token_id(config)).nonzero().tolist()
            for frames, height, width in [] if grids is None else grids.tolist():
                count = frames * height * width // merged
                row, last = tokens[count - 1]
                if last >= first:
                    items.append(VisualItem(frames, height, width, kind, row))
                tokens = tokens[count:]
        return cls(tuple(prompt.host_lengths), tuple(prompt.next_position.tolist()), tuple(items), first)

    def row(self, number: int) -> "PromptSize":
        """The size of one row alone."""
        items = tuple(replace(item, row=0) for item in self.items if item.row == number)
        return PromptSize(self.lengths[number : number + 1], self.positions[number : number + 1], items, self.first)

    def within(self, max_pixels: int, vision_config: Any) -> "PromptSize":
        """The size under a limit of pixels an item."""
        merge = vision_config.spatial_merge_size
        items = tuple(item.within(max_pixels, vision_config) for item in self.items)
        lengths, positions = list(self.lengths), list(self.positions)
        for old, new in zip(self.items, items, strict=True):
            lengths[new.row] -= (old.patches - new.patches) // merge**2
            # An image moves the text behind it on by its longer side, a video by that of each of its frames.
            longer = max(old.height, old.width) - max(new.height, new.width)
            positions[new.row] -= old.frames * longer // merge
        return PromptSize(tuple(lengths), tuple(positions), items, self.first)


def largest_pixels(size: PromptSize, vision_config: Any, fits: Callable[[PromptSize], bool]) -> int | None:
    """The largest limit of pixels an image, or a video, under which the prompt fits; None if none does.

    In steps of the pixels of one visual token.
    """
    step = (vision_config.patch_size * vision_config.spatial_merge_size) ** 2
    low, high = 0, max((item.patches for item in size.items), default=0) * vision_config.temporal_patch_size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(size.within(middle * step, vision_config)) else (low, middle - 1)
    return low * step or None


def pixel_advice(size: PromptSize, vision_config: Any, fits: Callable[[PromptSize], bool]) -> str:
    """The end of an error's message: the limit of pixels that would do; empty where there is nothing to shrink."""
    if not size.items:
        return ""
    limit = largest_pixels(size, vision_config, fits)
    kinds = " or ".join(sorted({item.kind.one for item in size.items}))
    if limit is None:
        return f"; no limit on the pixels of {kinds} makes it fit"
    return f"; it fits if the processor's `max_pixels` of {kinds} is {limit}"


def check_visual_inputs(config: Any, input_ids: torch.Tensor | None, **visual_inputs: torch.Tensor | None) -> None:
    """Raise `ValueError` unless pixels, grids and placeholder tokens agree in number, for images and for videos.

    Without `input_ids` the placeholder tokens are not counted.
    """
    merged = config.vision_config.spatial_merge_size**2
    for kind in MEDIA_KINDS:
        pixels, grid = visual_inputs.get(kind.pixels), visual_inputs.get(kind.grids)
        if (pixels is None) != (grid is None):
            raise ValueError(f"`{kind.pixels}` and `{kind.grids}` belong together: one of them is missing")
        tokens = None if input_ids is None else int((input_ids == kind.token_id(config)).sum())
        if pixels is None or grid is None:
            if tokens:
                raise ValueError(f"the prompt has {tokens} {kind.name} tokens but there is no `{kind.pixels}`")
            continue
        check_visual_shapes(config.vision_config, kind, pixels, grid)
        patches = int(grid.prod(-1).sum())
        if patches != pixels.shape[0]:
            raise ValueError(f"`{kind.grids}` speaks of {patches} patches, `{kind.pixels}` holds {pixels.shape[0]}")
        if tokens is not None and patches // merged != tokens:
            raise ValueError(
                f"the prompt has {tokens} {kind.name} tokens, `{kind.grids}` stands for {patches // merged} features"
            )


def check_visual_index(
    config: Any, visual_index: torch.Tensor, tokens: torch.Tensor, visual_inputs: Mapping[str, torch.Tensor | None]
) -> None:
    """Raise `ValueError` unless `visual_index` has the shape of the tokens and every entry is -1 or has a feature."""
    if visual_index.shape != tokens.shape[:2]:
        wanted, got = tuple(tokens.shape[:2]), tuple(visual_index.shape)
        raise ValueError(f"`visual_index` must have the shape of the tokens, {wanted}, got {got}")
    num_features = sum(int(counts.sum()) for *_, counts in visual_items(config, visual_inputs))
    lowest, highest = visual_index.aminmax()
    if lowest < -1 or highest >= num_features:
        wrong = int(lowest if lowest < -1 else highest)
        raise ValueError(f"`visual_index` holds {wrong}, pixels and grids give {num_features} visual features")


def check_visual_shapes(vision_config: Any, kind: MediaKind, pixels: torch.Tensor, grid: torch.Tensor) -> None:
    """Raise `ValueError` unless `pixels` is (patches, patch size), `grid` (items, 3) and its sides can be merged."""
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"`{kind.grids}` must have shape (items, 3) of integers, got {tuple(grid.shape)} of {grid.dtype}"
        )
    merge = grid.new_tensor([1, vision_config.spatial_merge_size, vision_config.spatial_merge_size])
    wrong = grid[((grid < 1) | (grid % merge != 0)).any(-1)]
    if len(wrong):
        raise ValueError(
            f"`{kind.grids}` holds {wrong[0].tolist()}: frames, height and width must be positive, height and width "
            f"multiples of {vision_config.spatial_merge_size}"
        )
    size = vision_config.in_channels * vision_config.temporal_patch_size * vision_config.patch_size**2
    if pixels.ndim != 2 or pixels.shape[1] != size:
        raise ValueError(f"`{kind.pixels}` must have shape (patches, {size}), got {tuple(pixels.shape)}")


def check_visual_layout(config: Any, input_ids: torch.Tensor, **grids: torch.Tensor | None) -> None:
    """Raise `ValueError` unless each image, and each frame of a video, is one run of tokens behind a vision start.

    The runs must have the lengths of the grids, in their order. Some versions of transformers fail on other layouts
    without saying why, others give them wrong positions.
    """
    merged = config.vision_config.spatial_merge_size**2
    for kind in MEDIA_KINDS:
        grid, is_visual = grids.get(kind.grids), input_ids == kind.token_id(config)
        begins = is_visual & ~torch.nn.functional.pad(is_visual, [1, 0])[:, :-1]
        before = torch.nn.functional.pad(input_ids, [1, 0], value=-1)[:, :-1][begins]
        if (before != config.vision_start_token_id).any():
            start = config.vision_start_token_id
            raise ValueError(f"a run of {kind.name} tokens must follow a vision start token {start}")
        found = begins.flatten().cumsum(0)[is_visual.flatten()].bincount()[1:].tolist()
        wanted: list[int] = []
        for frames, *sides in [] if grid is None else grid.tolist():
            tokens = math.prod(sides) // merged
            wanted += [tokens] * frames if kind.has_frames else [tokens * frames]
        if found != wanted:
            raise ValueError(
                f"the prompt has {kind.name} tokens in runs of {found}, `{kind.grids}` asks for runs of {wanted}: one "
                f"for each {kind.part}"
            )


def check_known(call: str, arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `ValueError` if an argument that asks for something, hence is not None, is none of the `known`."""
    unknown = sorted(name for name, value in arguments.items() if value is not None and name not in known)
    if unknown:
        raise ValueError(f"`{call}` does not know {', '.join(f'`{name}`' for name in unknown)}")


def visual_tensor(name: str, value: Any) -> torch.Tensor:
    """Pixels as they are, grids as a tensor; `ValueError` for anything else."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        if name in (kind.grids for kind in MEDIA_KINDS):
            return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}")


def check_tensors(**named: Any) -> None:
    """Raise `ValueError` for an argument that is neither None nor a tensor; ids and labels must be integers."""
    for name, value in named.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}")
        if name in ("input_ids", "labels") and (value.dtype not in INTEGERS or value.ndim != 2):
            raise ValueError(
                f"`{name}` must be an integer tensor (batch, length), got {tuple(value.shape)} of {value.dtype}"
            )


def check_positions(position_ids: torch.Tensor, batch: int, length: int) -> None:
    """Raise `ValueError` unless they are those of (batch, length) tokens: one, three or four for each."""
    *planes, rows, columns = (1, *position_ids.shape) if position_ids.ndim == 1 else position_ids.shape
    if planes not in ([], [3], [4]) or rows not in (1, batch) or columns != length:
        wanted, got = (4, batch, length), tuple(position_ids.shape)
        raise ValueError(f"`position_ids` must have shape (4 or 3, batch, length) = {wanted}, got {got}")


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether an argument that other `generate`s take has no effect by its value, as callers of any model pass it."""
    if value is None or name in IGNORED_INPUTS:
        return True
    if name == "token_type_ids":
        return not np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value).any()
    return name in NEUTRAL_ARGUMENTS and value is NEUTRAL_ARGUMENTS[name]


def check_left_alone(model: Any) -> None:
    """Raise `ValueError` if something changed the model in a way that decoding does not look at.

    Such are another `prepare_inputs_for_generation`, and adapters for single rows: rows share forwards in any order.
    """
    now = getattr(model.prepare_inputs_for_generation, "__func__", None)
    if now is not type(model).prepare_inputs_for_generation:
        raise ValueError(
            "`prepare_inputs_for_generation` of the model was replaced, as PEFT does for prompt and prefix tuning: "
            "block-diffusion decoding does not support learnt prompts"
        )
    found = [
        (module, number, hook.keywords)
        for module in model.modules()
        for number, hook in module._forward_pre_hooks.items()
        if len(keywords_of(hook).get("adapter_names") or ()) > 1 or "alora_offsets" in keywords_of(hook)
    ]
    for module, number, _ in found:  # PEFT would leave them behind an error, and the model would answer nobody else
        module._forward_pre_hooks.pop(number)
        module._forward_pre_hooks_with_kwargs.pop(number, None)
    if found:
        stated = " and ".join(f"`{name}={value!r:.80}`" for name, value in found[0][2].items())
        raise ValueError(
            f"PEFT's {stated}: block-diffusion decoding does not support adapters of single rows or places; call "
            "`generate` once for each adapter"
        )


def keywords_of(hook: Any) -> dict[str, Any]:
    """The named arguments of a `functools.partial`; empty for any other function."""
    return getattr(hook, "keywords", None) or {}


def check_ids(input_ids: Any) -> None:
    """Raise `ValueError` unless `input_ids` is an integer tensor (batch, length) with something in it."""
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(f"`input_ids` must be an integer tensor (batch, length), got {type(input_ids).__name__}")
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"`input_ids` must be an integer tensor (batch, length), got {tuple(input_ids.shape)} of {input_ids.dtype}"
        )
    if 0 in input_ids.shape:
        raise ValueError(f"the prompt is empty: `input_ids` has shape {tuple(input_ids.shape)}")


def check_prompt(
    config: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, mask_token_id: int
) -> torch.Tensor:
    """Check a (batch, length) prompt for block-diffusion decoding; return its attention mask, all ones if None.

    Raises:
        ValueError: shape, padding or an id is wrong; the message names the value.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"`attention_mask` must be a tensor (batch, length), got {type(attention_mask).__name__}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, `input_ids` {tuple(input_ids.shape)}; "
            "`generate` takes a 2-D mask over the prompt"
        )
    other = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
    if len(other):
        raise ValueError(f"`attention_mask` must hold 0 for padding and 1 for real tokens, got {other[0].item()}")
    real = attention_mask.bool()
    for row in range(len(real)):
        if not real[row].any():
            raise ValueError(f"row {row} of `attention_mask` has no real token")
        if not real[row, real[row].long().argmax() :].all():
            raise ValueError(f"row {row} of `attention_mask` has padding right of a real token: pad on the left")
    vocab_size = config.get_text_config().vocab_size
    outside = input_ids[real & ((input_ids < 0) | (input_ids >= vocab_size))]
    if len(outside):
        raise ValueError(f"token id {int(outside[0])} lies outside the vocabulary of {vocab_size} tokens")
    if ((input_ids == mask_token_id) & real).any():
        raise ValueError(f"the prompt contains the mask token {mask_token_id}")
    return attention_mask


def check_length(config: Any, prompt: Prompt, num_new_tokens: int, block_size: int) -> None:
    """Raise `ValueError` if a row's RoPE positions, whole response blocks included, would run past the model's.

    The message names the limit of pixels, if any, under which the prompt would fit.
    """
    limit = config.get_text_config().max_position_embeddings
    longest, new = int(prompt.next_position.max()), -(-num_new_tokens // block_size) * block_size
    if longest + new <= limit:
        return
    size = PromptSize.of(config, prompt)
    advice = pixel_advice(size, config.vision_config, lambda smaller: max(smaller.positions) + new <= limit)
    if longest > limit:
        raise ValueError(
            f"a prompt reaches position {longest}, the model has {limit} (`max_position_embeddings`){advice}"
        )
    raise ValueError(
        f"a prompt reaches position {longest}: with {num_new_tokens} new tokens in blocks of {block_size} it "
        f"passes the model's {limit} (`max_position_embeddings`); there is room for "
        f"{(limit - longest) // block_size * block_size}{advice}"
    )


def response_limits(config: Any, prompt: Prompt, num_new_tokens: int, block_size: int, is_stated: bool) -> list[int]:
    """Most response tokens of each row: as many as are asked for, or the whole blocks before the model's last position.

    A row's limit depends on its own prompt alone. If a number that `is_stated` is cut, a warning says so, once.

    Raises:
        ValueError: a prompt leaves no room for one block.
    """
    check_length(config, prompt, min(num_new_tokens, block_size), block_size)
    limit = config.get_text_config().max_position_embeddings
    limits = [
        min(num_new_tokens, (limit - first) // block_size * block_size) for first in prompt.next_position.tolist()
    ]
    if is_stated and min(limits) < num_new_tokens:
        logger.warning_once(
            f"{num_new_tokens} new tokens are asked for: responses end earlier where prompt and response reach the "
            f"model's {limit} positions (`max_position_embeddings`)"
        )
    return limits
