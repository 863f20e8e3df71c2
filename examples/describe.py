r"""Describe a picture, and watch the blocks being written.

    python examples/describe.py [examples/images/3.png]
    python examples/describe.py photo.jpg --block-size 16 \
        --model fudan-generative-ai/Bard-VL-B16-Mask-4B-Distil-Instruct

Without --model a small checkpoint beside this script answers. It knows coloured shapes on a grid and a few words:
"Describe the picture.", "What is at b3?", "What is in row 2?", "Which word is written?".
"""

import argparse
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Any

import bard_vl
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, TextStreamer
from transformers.image_utils import load_image

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
PICTURE = HERE / "images" / "1.png"


class DraftStreamer(TextStreamer):
    """Prints finished blocks; on a terminal, also the block in progress in grey, with a glyph for each open token."""

    def __init__(self, processor: bard_vl.BardVLProcessor):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.processor = processor
        self.column = 0  # where the finished text ends
        self.draft_rows: int | None = None  # how many rows below that the draft ends; None without a draft

    def put_draft(self, value: torch.Tensor) -> None:
        """Replace the grey text by the block's present state: ids (1, block size)."""
        width = shutil.get_terminal_size().columns
        if not sys.stdout.isatty() or self.column >= width:  # no code moves the cursor back behind a full row
            return
        draft = "".join(c if c.isprintable() else " " for c in self.processor.decode_draft(value[0]))
        while sum(map(cells, draft)) > width:
            draft = draft[:-1]
        self.clear_draft()
        print(f"\033[90m{draft}\033[0m", end="", flush=True)
        self.draft_rows = after(draft, self.column, width)[0]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print finished text in the place of the draft."""
        if sys.stdout.isatty():
            text = text.expandtabs(4)
            self.clear_draft()
            self.column = after(text, self.column, shutil.get_terminal_size().columns)[1]
        super().on_finalized_text(text, stream_end)

    def clear_draft(self) -> None:
        """Erase the grey text."""
        if self.draft_rows is not None:
            # Up and right, not to a place saved: the screen may have scrolled. A count of 0 would move by 1.
            up = f"\033[{self.draft_rows}A" if self.draft_rows else ""
            right = f"\033[{self.column}C" if self.column else ""
            print(f"{up}\r{right}\033[J", end="", flush=True)
            self.draft_rows = None


def cells(character: str) -> int:
    """Columns that a character takes on a terminal."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def after(text: str, column: int, width: int) -> tuple[int, int]:
    """Rows down, and the column, where `text` printed at `column` of a terminal ends; `width` behind a full row."""
    rows = 0
    for character in text:
        if character == "\n" or column + cells(character) > width:
            rows, column = rows + 1, 0
        column += cells(character) * (character != "\n")
    return rows, column


def parse_arguments() -> tuple[argparse.Namespace, bard_vl.BardVLGenerationConfig]:
    """Read the command line; settings out of range end the script with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", default=str(PICTURE), help="path or URL of a picture, default: one of ours")
    parser.add_argument(
        "--model", default=str(CHECKPOINT), help="folder or Hub id of a checkpoint, default: a small one"
    )
    parser.add_argument("--prompt", default="Describe the picture.", help="what to ask, default: %(default)s")
    parser.add_argument("--block-size", type=int, help="needed where the checkpoint's config.json does not state it")
    parser.add_argument("--threshold", type=float, help="confidence_threshold, default: the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens to write, default: %(default)s")
    arguments = parser.parse_args()
    try:
        settings = bard_vl.BardVLGenerationConfig(
            block_size=arguments.block_size,
            confidence_threshold=arguments.threshold,
            max_new_tokens=arguments.max_new_tokens,
        )
    except ValueError as error:
        parser.error(one_line(error))
    config = AutoConfig.from_pretrained(arguments.model)
    if not isinstance(config, bard_vl.BardVLConfig):
        parser.error(f"{arguments.model} is no Bard-VL checkpoint: its model type is {config.model_type}")
    if (config.block_size, arguments.block_size) == (None, None):
        parser.error(f"{arguments.model} states no block size: give --block-size, the number after B in its name")
    return arguments, settings


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def read_picture(place: str) -> Any:
    """Open a picture at a path or URL; `ValueError` if there is none."""
    try:
        return load_image(place)
    except Exception as error:  # what an HTTP client raises depends on the version of transformers
        raise ValueError(f"{place} cannot be read as a picture: {one_line(error)}") from error


def describe(arguments: argparse.Namespace, settings: bard_vl.BardVLGenerationConfig) -> None:
    """Describe the picture, and say what it cost."""
    content = [{"type": "image", "image": read_picture(arguments.image)}, {"type": "text", "text": arguments.prompt}]
    processor = bard_vl.BardVLProcessor.from_pretrained(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto").to(device)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device)
    output = model.generate(
        **inputs, generation_config=settings, streamer=DraftStreamer(processor), return_dict_in_generate=True
    )
    steps, forwards = output.block_step_counts[0].tolist(), sum(output.num_forwards.values())
    print(f"denoising steps of each block: {', '.join(map(str, steps))}")
    print(f"{forwards} forwards, {output.tokens_per_forward[0]:.2f} tokens per forward")


def main() -> None:
    """Run the script; a wrong path, picture or setting ends it with one line."""
    try:
        describe(*parse_arguments())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
