"""What comes in: prompts checked before any compute, and realigned to column 0; images and videos as one feature table.

Inside the package a batch is padded on the right: then column and text position agree, and block edges of all rows lie
in the same columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .cache_bard_vl import fingerprint

VISUAL_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


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
    config: Any, visual_inputs: dict[str, torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Images, then videos, as (token id, pixels (patches, size), grids (items, 3), tokens per item (items,))."""
    merged = config.vision_config.spatial_merge_size**2
    for token_id, pixels, grids in (
        (config.image_token_id, "pixel_values", "image_grid_thw"),
        (config.video_token_id, "pixel_values_videos", "video_grid_thw"),
    ):
        if visual_inputs.get(pixels) is not None:
            grid = visual_inputs[grids]
            yield token_id, visual_inputs[pixels], grid, grid.prod(-1) // merged


def check_visual_inputs(config: Any, input_ids: torch.Tensor, **visual_inputs: torch.Tensor | None) -> None:
    """Raise `ValueError` unless pixels, grids and placeholder tokens agree in number, for images and for videos."""
    merged = config.vision_config.spatial_merge_size**2
    for kind, token_id, pixels_name, grid_name in (
        ("image", config.image_token_id, "pixel_values", "image_grid_thw"),
        ("video", config.video_token_id, "pixel_values_videos", "video_grid_thw"),
    ):
        pixels, grid = visual_inputs.get(pixels_name), visual_inputs.get(grid_name)
        if (pixels is None) != (grid is None):
            raise ValueError(f"`{pixels_name}` and `{grid_name}` belong together: one of them is missing")
        tokens = int((input_ids == token_id).sum())
        if pixels is None or grid is None:
            if tokens:
                raise ValueError(f"the prompt has {tokens} {kind} tokens but there is no `{pixels_name}`")
            continue
        patches = int(grid.prod(-1).sum())
        if patches != pixels.shape[0]:
            raise ValueError(f"`{grid_name}` speaks of {patches} patches, `{pixels_name}` holds {pixels.shape[0]}")
        if patches // merged != tokens:
            raise ValueError(
                f"the prompt has {tokens} {kind} tokens, `{grid_name}` stands for {patches // merged} features"
            )


def check_prompt(config: Any, input_ids: Any, attention_mask: torch.Tensor | None, mask_token_id: int) -> torch.Tensor:
    """Check a (batch, length) prompt for block-diffusion decoding; return its attention mask, all ones if None.

    Raises:
        ValueError: shape, padding or an id is wrong; the message names the value.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        what = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids` must be an integer tensor (batch, length), got {what}")
    if 0 in input_ids.shape:
        raise ValueError(f"the prompt is empty: `input_ids` has shape {tuple(input_ids.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, `input_ids` {tuple(input_ids.shape)}; "
            "`generate` takes a 2-D mask over the prompt"
        )
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


def check_length(config: Any, prompt: Prompt, num_new_tokens: int) -> None:
    """Raise `ValueError` if a row's RoPE positions, response included, would run past what the model was built for."""
    limit = config.get_text_config().max_position_embeddings
    longest = int(prompt.next_position.max())
    if longest > limit:
        raise ValueError(f"a prompt reaches position {longest}, the model has {limit} (`max_position_embeddings`)")
    if longest + num_new_tokens > limit:
        raise ValueError(
            f"a prompt reaches position {longest}: with {num_new_tokens} new tokens it passes the model's {limit} "
            f"(`max_position_embeddings`); `max_new_tokens` may be {limit - longest} at most"
        )


__all__ = [
    "VISUAL_INPUTS",
    "Prompt",
    "VisualFeatures",
    "check_length",
    "check_prompt",
    "check_visual_inputs",
    "visual_items",
]
