"""Ragged prompts with images and videos for the tiny golden models: what several test files share."""

import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bard_vl import BardVLForConditionalGeneration, BardVLGenerationOutput
from hypothesis import strategies as st

IMAGE, VIDEO, VISION_START, VISION_END, MASK, NUM_TEXT_TOKENS = 500, 501, 502, 503, 510, 500
PAD, EXCUSED_MARGIN = 7, 1e-4
PATCH_SIZE = 3 * 2 * 8 * 8
GRIDS = ((1, 4, 4), (1, 2, 6), (1, 4, 2), (2, 4, 4), (3, 2, 2))
NO_ID = 511  # an id that the tiny models do not generate in these tests, as the end of sequence


@cache
def load(attention: str = "bard_vl") -> BardVLForConditionalGeneration:
    path = Path(__file__).parent / "golden" / "untied"
    return BardVLForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, mask_token_id=MASK, attn_implementation=attention
    ).eval()


@dataclass
class Row:
    """One prompt: ids, and pixels and grids of its images and videos in order."""

    ids: list[int] = field(default_factory=list)
    images: list[tuple[torch.Tensor, tuple[int, int, int]]] = field(default_factory=list)
    videos: list[tuple[torch.Tensor, tuple[int, int, int]]] = field(default_factory=list)

    def then(self, ids: list[int]) -> "Row":
        return Row(self.ids + ids, self.images, self.videos)

    def add_text(self, length: int, seed: int) -> "Row":
        return self.then(random.Random(seed).choices(range(NUM_TEXT_TOKENS), k=length))

    def add_image(self, grid: tuple[int, int, int], seed: int, closed: bool = True) -> "Row":
        _, height, width = grid = (1, *grid[1:])
        row = self.then([VISION_START, *[IMAGE] * (height * width // 4), *[VISION_END][: int(closed)]])
        row.images = [*self.images, (pixels(grid, seed), grid)]
        return row

    def add_video(self, grid: tuple[int, int, int], seed: int, closed: bool = True) -> "Row":
        frames, height, width = grid
        row = self
        for frame in range(frames):
            stamp = random.Random(seed + frame).choices(range(NUM_TEXT_TOKENS), k=2)
            end = [VISION_END][: int(closed or frame + 1 < frames)]
            row = row.then([*stamp, VISION_START, *[VIDEO] * (height * width // 4), *end])
        row.videos = [*self.videos, (pixels(grid, seed), grid)]
        return row


def pixels(grid: tuple[int, int, int], seed: int) -> torch.Tensor:
    patches = grid[0] * grid[1] * grid[2]
    return torch.randn(patches, PATCH_SIZE, generator=torch.Generator().manual_seed(seed))


@st.composite
def rows(draw: st.DrawFn, max_length: int = 40) -> Row:
    """A prompt of 1 to `max_length` tokens: text, images, videos, in any order; it may end within an image."""
    row, seeds = Row(), st.integers(0, 999)
    for kind in draw(st.lists(st.sampled_from(["text", "text", "image", "video"]), min_size=1, max_size=4)):
        if kind == "text":
            longer = row.add_text(draw(st.integers(1, 16)), draw(seeds))
        else:
            longer = getattr(row, f"add_{kind}")(draw(st.sampled_from(GRIDS)), draw(seeds))
        row = longer if len(longer.ids) <= max_length else row
    if not row.ids or (len(row.ids) < max_length - 3 and draw(st.integers(0, 9)) == 0):
        row = row.add_image((1, 2, 4), draw(seeds), closed=False)
    return row


@st.composite
def settings(draw: st.DrawFn, max_new_tokens: int = 24) -> dict[str, Any]:
    """Arguments of `generate` that make rows take different step counts and end at different blocks."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    num_eos, seed = draw(st.sampled_from([0, 8, 32, 64])), draw(st.integers(0, 99))
    return {
        "block_size": block_size,
        "denoising_steps": draw(st.integers(1, block_size)),
        "remasking_strategy": draw(st.sampled_from(["low_confidence_dynamic", "low_confidence_static"])),
        "confidence_threshold": draw(st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.4, 0.9, 1.0])),
        "eos_token_id": [NO_ID, *random.Random(seed).sample(range(NUM_TEXT_TOKENS), num_eos)],
        "max_new_tokens": draw(st.integers(1, max_new_tokens)),
        "pad_token_id": PAD,
    }


def collate(batch: list[Row], padding_id: int = PAD) -> dict[str, torch.Tensor]:
    """The processor's output for these prompts, padded on the left."""
    longest = max(len(row.ids) for row in batch)
    inputs = {
        "input_ids": torch.tensor([[padding_id] * (longest - len(row.ids)) + row.ids for row in batch]),
        "attention_mask": torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in batch]),
    }
    for pixels_name, grid_name, items in (
        ("pixel_values", "image_grid_thw", [item for row in batch for item in row.images]),
        ("pixel_values_videos", "video_grid_thw", [item for row in batch for item in row.videos]),
    ):
        if items:
            inputs[pixels_name] = torch.cat([values for values, _ in items])
            inputs[grid_name] = torch.tensor([grid for _, grid in items])
    return inputs


def generate(model: BardVLForConditionalGeneration, batch: list[Row], **arguments: Any) -> BardVLGenerationOutput:
    return model.generate(**collate(batch), return_dict_in_generate=True, output_history=True, **arguments)


def response(output: BardVLGenerationOutput, batch: list[Row], row: int, eos: list[int]) -> list[int]:
    """The response of a row up to and including the first EOS."""
    tokens = output.sequences[row, max(len(prompt.ids) for prompt in batch) :].tolist()
    ends = [place for place, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


def partition_sequence(prompt_lengths: torch.Tensor, num_columns: int, block_size: int) -> torch.Tensor:
    """Block of every column when each row holds its prompt from column 0 and its response right after it.

    The prompt is cut from position 0, its last block may be short; response blocks begin at the prompt's end.

    Args:
        prompt_lengths: (batch,) prompt tokens of each row.
        num_columns: columns to number.
        block_size: tokens per block.

    Returns:
        (batch, num_columns) block numbers, ascending along each row.
    """
    columns = torch.arange(num_columns, device=prompt_lengths.device)[None]
    lengths = prompt_lengths[:, None]
    prompt_blocks = (lengths + block_size - 1) // block_size
    return torch.where(columns < lengths, columns // block_size, prompt_blocks + (columns - lengths) // block_size)
