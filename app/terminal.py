"""Text on a terminal as it is being denoised: finished blocks, and the block in progress in grey."""

import os
import shutil
import sys
import unicodedata
from typing import Any

import torch
from transformers import TextStreamer


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 step, 2 steps."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class DraftStreamer(TextStreamer):
    """Prints finished blocks; on a terminal, also the block in progress in grey, with a glyph for each open token.

    Where standard output is no terminal, or a plain one (`NO_COLOR`, `TERM=dumb`), only the text is written.
    """

    def __init__(self, processor: Any):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.processor = processor
        self.is_live = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.column = 0  # where the finished text ends
        self.draft_rows: int | None = None  # how many rows below that the draft ends; None without a draft

    def put_draft(self, value: torch.Tensor) -> None:
        """Replace the grey text by the block's present state: ids (1, block size)."""
        width = shutil.get_terminal_size().columns
        if not self.is_live or self.column >= width:  # no code moves the cursor back behind a full row
            return
        draft = "".join(c if c.isprintable() else " " for c in self.processor.decode_draft(value[0]))
        while sum(map(cells, draft)) > width:
            draft = draft[:-1]
        self.clear_draft()
        print(f"\033[90m{draft}\033[0m", end="", flush=True)
        self.draft_rows = after(draft, self.column, width)[0]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print finished text in the place of the draft."""
        if self.is_live:
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
