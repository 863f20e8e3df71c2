"""`bard-vl demo`: a web page to try a checkpoint."""

import importlib.util
from typing import Annotated

import typer

from .ending import Misuse, interrupted_at_once
from .options import (
    BlockSize,
    Device,
    DeviceMap,
    Dtype,
    MaxNewTokens,
    MaxPixels,
    MinPixels,
    Model,
    Others,
    Quantize,
    Revision,
    Steps,
    Threshold,
    open_session,
    print_notices,
)


def demo(
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device_map: DeviceMap = None,
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
        raise Misuse('the demo page needs gradio: pip install "bard-vl[demo]"')
    session = open_session(
        model,
        revision,
        device,
        dtype,
        block_size,
        threshold,
        steps,
        max_new_tokens,
        None,
        others,
        max_pixels,
        min_pixels,
        quantize,
        device_map,
    )
    print_notices(session)
    with interrupted_at_once():
        from bard_vl.viewer.demo import build_page, serve

    serve(build_page(session), host, port)


EXAMPLES = """\
[bold]Example[/bold]

bard-vl demo --model Bard-VL-4B --port 8000
"""
