"""Options that several commands take, and what becomes of them."""

from typing import Annotated

import typer

from ..app.session import build_settings
from ..generation_config_bard_vl import BardVLGenerationConfig

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
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.", rich_help_panel=MODEL)
]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32. Default: the checkpoint's.", rich_help_panel=MODEL),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        help="Tokens denoised together: the number after B in a checkpoint's name. Default: its config's.",
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


def settings_of(
    block_size: int | None,
    threshold: float | None,
    steps: int | None,
    max_new_tokens: int | None,
    temperature: float | None,
    others: list[str] | None,
) -> BardVLGenerationConfig:
    """The settings that these options state; `UsageError` if one is wrong."""
    named = {
        "block_size": block_size,
        "confidence_threshold": threshold,
        "denoising_steps": steps,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
    }
    return build_settings(named, others)
