"""`bard-vl models`: the published checkpoints, their settings, and the memory that they take."""

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import load_package


def models(as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> None:
    """List the published checkpoints: block size, threshold, and weights in gigabytes.

    What `--model` names in `run`, `chat` and `demo`: block size and threshold are then taken from the name. Memory is
    that of the weights alone; `bard-vl run --dry-run` adds a prompt and its answer.
    """
    load_package()
    from bard_vl.app.checkpoints import PUBLISHED, WEIGHTS

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
