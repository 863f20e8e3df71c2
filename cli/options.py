"""Options that several commands take, and what becomes of them."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .ending import interrupted_at_once

if TYPE_CHECKING:
    from bard_vl.app.session import Session

MODEL, GENERATION, MEDIA = "Model", "Generation", "Pictures and videos"  # panels of the help

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="BARD_VL_MODEL",
        metavar="FOLDER|HUB_ID",
        help="Bard-VL checkpoint. Default: the small trained one of a checkout of the repository.",
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id.", metavar="NAME", rich_help_panel=MODEL)
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, mps, xpu. Default: the best that is there.",
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32. Default: the checkpoint's.", rich_help_panel=MODEL),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="int8 or nf4: the language model's linear layers in 8 or 4 bits.",
        metavar="int8|nf4",
        rich_help_panel=MODEL,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="auto: spread the weights over all GPUs, and over the CPU's memory if they are too small.",
        metavar="auto",
        rich_help_panel=MODEL,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        help="Tokens denoised together. Default: as the checkpoint's config says, or its name.",
        rich_help_panel=GENERATION,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Commit every token more probable than this; lower is faster. Default: the checkpoint's, or 0.9.",
        rich_help_panel=GENERATION,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Denoising steps per block at most. Default: one a token.", rich_help_panel=GENERATION),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Longest response. Default: the checkpoint's, or 256.", rich_help_panel=GENERATION),
]
Temperature = Annotated[
    float | None, typer.Option(help="Sample above 0. Default: 0, greedy.", rich_help_panel=GENERATION)
]
Seed = Annotated[int | None, typer.Option(help="Repeat a sampled response.", rich_help_panel=GENERATION)]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting of generation, for instance remasking_strategy=margin. Repeatable.",
        rich_help_panel=GENERATION,
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Shrink a picture, or a video in all its frames, to so many pixels. Default: the checkpoint's.",
        rich_help_panel=MEDIA,
    ),
]
MinPixels = Annotated[int | None, typer.Option(min=1, help="Enlarge them to so many pixels.", rich_help_panel=MEDIA)]


def load_package() -> None:
    """Import the package, which takes seconds; from here on transformers keeps its bars and advice to itself."""
    with interrupted_at_once():
        from bard_vl.app.session import quieten
    quieten()


def open_session(
    model: str | None,
    revision: str | None,
    device: str | None,
    dtype: str | None,
    block_size: int | None,
    threshold: float | None,
    steps: int | None,
    max_new_tokens: int | None,
    temperature: float | None,
    others: list[str] | None,
    max_pixels: int | None,
    min_pixels: int | None,
    quantize: str | None = None,
    device_map: str | None = None,
    memory: int | None = None,
) -> "Session":
    """A session as these options state it, before its weights are read; `UsageError` if one is wrong."""
    load_package()
    with interrupted_at_once():
        from bard_vl.app.session import Session, build_settings

        named = {
            "block_size": block_size,
            "confidence_threshold": threshold,
            "denoising_steps": steps,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
        }
        settings, pixels = build_settings(named, others), (max_pixels, min_pixels)
        return Session(model, settings, revision, device, dtype, *pixels, quantize, device_map, memory)


def print_notices(session: "Session") -> None:
    """Say on standard error what one should know about the checkpoint and its settings."""
    for notice in session.notices:
        print(notice, file=sys.stderr)
