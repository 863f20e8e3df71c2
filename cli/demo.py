"""`bard-vl demo`: a web page to try a checkpoint."""

import importlib.util
from typing import Annotated

import typer

from ..app.errors import UsageError
from ..app.session import Session
from .options import (
    BlockSize,
    Device,
    Dtype,
    MaxNewTokens,
    MaxPixels,
    MinPixels,
    Model,
    Others,
    Revision,
    Steps,
    Threshold,
    settings_of,
)


def demo(
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    threshold: Threshold = None,
    steps: Steps = None,
    max_new_tokens: MaxNewTokens = None,
    others: Others = None,
    max_pixels: MaxPixels = None,
    min_pixels: MinPixels = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 7860,
) -> None:
    """Serve a page where pictures are uploaded, settings tried and answers watched.

    Needs gradio: pip install "bard-vl\\[demo]".
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError('the demo page needs gradio: pip install "bard-vl[demo]"')
    from ..viewer.demo import build_page, serve

    settings = settings_of(block_size, threshold, steps, max_new_tokens, None, others)
    session = Session(model, settings, revision, device, dtype, max_pixels, min_pixels)
    serve(build_page(session), host, port)


EXAMPLES = """\
[bold]Example[/bold]

bard-vl demo --model Bard-VL-4B --port 8000
"""
