"""`bard-vl models`: the published checkpoints, their settings, and the memory that they take."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

# The command answers at once, without torch: so the table is here, and not in `bard_vl`, which loads it. Tests compare
# it with the converter's rules for names and with the weights' shapes.


@dataclass(frozen=True)
class Published:
    """A checkpoint of the paper's authors.

    Attributes:
        size: of the Qwen3-VL that it was made of, such as `4B`.
        block_size: in tokens.
        is_distilled: whether it was distilled from the checkpoint of the smallest blocks.
        threshold: the confidence threshold that its authors recommend; None if they recommend none.
    """

    size: str
    block_size: int
    is_distilled: bool
    threshold: float | None = None

    @property
    def name(self) -> str:
        """Its Hub id."""
        distilled = "-Distil" if self.is_distilled else ""
        return f"fudan-generative-ai/Bard-VL-B{self.block_size}-Mask-{self.size}{distilled}-Instruct"


# As listed by the authors: https://github.com/fudan-generative-vision/Bard-VL
PUBLISHED = (
    Published("2B", 4, is_distilled=False),
    Published("2B", 4, is_distilled=True),
    Published("2B", 8, is_distilled=True),
    Published("2B", 16, is_distilled=True, threshold=0.5),
    Published("4B", 4, is_distilled=False),
    Published("4B", 8, is_distilled=True),
    Published("4B", 16, is_distilled=True, threshold=0.5),
    Published("4B", 32, is_distilled=True),
    Published("8B", 4, is_distilled=False),
)
# Gigabytes of the weights by how they are loaded: bfloat16, and `--quantize int8` and `nf4`.
WEIGHTS = {
    "2B": {"bfloat16": 4.3, "int8": 2.8, "nf4": 2.2},
    "4B": {"bfloat16": 8.9, "int8": 5.2, "nf4": 3.5},
    "8B": {"bfloat16": 17.5, "int8": 10.6, "nf4": 7.2},
}


def models(as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> None:
    """List the published checkpoints: block size, threshold, and weights in gigabytes.

    What `--model` names in `run`, `chat` and `demo`: block size and threshold are then taken from the name. Memory is
    that of the weights alone; `bard-vl run --dry-run` adds a prompt and its answer.
    """
    rows = [
        {
            "model": each.name,
            "url": f"https://huggingface.co/{each.name}",
            "block_size": each.block_size,
            "confidence_threshold": each.threshold,
            "weights_gb": WEIGHTS[each.size],
        }
        for each in PUBLISHED
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("model", "block", "threshold", "bfloat16", "int8", "nf4"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for each in PUBLISHED:
        sizes = [f"{gigabytes:.1f} GB" for gigabytes in WEIGHTS[each.size].values()]
        table.add_row(each.name, str(each.block_size), str(each.threshold or "-"), *sizes)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


EXAMPLES = """\
[bold]Examples[/bold]

bard-vl models

bard-vl run photo.jpg --model fudan-generative-ai/Bard-VL-B16-Mask-4B-Distil-Instruct --dry-run --memory 12GB
"""
