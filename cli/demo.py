"""`bard-vl demo`: a web page to try a checkpoint."""

import importlib.util
from typing import Annotated, Any

import typer

from .ending import Misuse, interrupted_at_once
from .options import open_session, opens_session, print_notices


@opens_session
def demo(
    *,
    options: dict[str, Any],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 7860,
) -> None:
    """Serve a page where pictures are uploaded, settings tried and answers watched.

    Needs gradio: pip install "bard-vl\\[demo]".
    """
    if importlib.util.find_spec("gradio") is None:
        raise Misuse('the demo page needs gradio: pip install "bard-vl[demo]"')
    session = open_session(options)
    print_notices(session)
    with interrupted_at_once():
        from bard_vl.viewer.demo import build_page, serve

    serve(build_page(session), host, port)


EXAMPLES = """\
[bold]Example[/bold]

bard-vl demo --model Bard-VL-4B --port 8000
"""
