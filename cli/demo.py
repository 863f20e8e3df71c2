"""`bard-vl demo`: a web page to try a checkpoint."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from .ending import Misuse, interrupted_at_once
from .options import open_session, opens_session, print_notices


@opens_session
def demo(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE", help="Pictures to try, shown on the page. Default: ours.")
    ] = None,
    *,
    options: dict[str, Any],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 7860,
) -> None:
    """Serve a page where pictures are uploaded, questions asked in turn, settings tried and answers watched.

    Needs gradio: pip install "bard-vl\\[demo]".
    """
    if importlib.util.find_spec("gradio") is None:
        raise Misuse('the demo page needs gradio: pip install "bard-vl[demo]"')
    missing = next((file for file in files or [] if not Path(file).is_file()), None)
    if missing is not None:
        raise Misuse(f"{missing}: no such picture")
    session = open_session(options)
    print_notices(session)
    with interrupted_at_once():
        from bard_vl.viewer.demo import build_page, serve

    serve(build_page(session, files or ()), host, port)


EXAMPLES = """\
[bold]Example[/bold]

bard-vl demo --model Bard-VL-4B --port 8000

bard-vl demo photo.jpg other.jpg --model Bard-VL-4B
"""
