"""A recording as one HTML file that plays it: no network, no dependency, light and dark."""

import base64
import functools
import html
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image

from ..app.boxes import colours_of
from ..app.terminal import counted
from .recording import Recording

MAX_SIDE = 1024  # pixels of a picture in the page


def write_html(recording: Recording, path: str | Path) -> None:
    """Write the page to `path`."""
    Path(path).write_text(html_of(recording), encoding="utf-8")


def html_of(recording: Recording) -> str:
    """The page: plays the steps of each block beside the pictures; see docs/viewer.md for its keys."""
    things = list(zip(recording.things, colours_of(recording.things), strict=True))
    images = [data_uri(image) for image in recording.images]
    return template().render(recording=recording, data=as_json(recording), images=images, things=things)


def frame_of(recording: Recording, height: int = 660) -> str:
    """The page as an `<iframe>` of a height in pixels, for notebooks and other pages."""
    style = f"width:100%;height:{height}px;border:0"
    page = html.escape(html_of(recording))
    return f'<iframe title="Player of the steps" sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe>'


def as_json(recording: Recording) -> dict[str, Any]:
    """The data that the page's script reads."""
    steps = [
        {
            "block": step.block,
            "texts": step.texts,
            "committed": step.committed,
            "revised": step.revised,
            "confidence": step.confidence,
            "guesses": step.guesses,
        }
        for step in recording.steps
    ]
    sizes = {"blockSize": recording.block_size, "numTokens": recording.num_tokens}
    return {"steps": steps, **sizes, "dictated": sorted(recording.dictated)}


def data_uri(image: Image.Image) -> str:
    """A picture inside the page, as PNG or JPEG, whichever is smaller."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


@functools.cache
def template() -> Any:
    """The page's template."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=select_autoescape(["html", "jinja"]), trim_blocks=True)
    environment.filters["counted"] = counted
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment.get_template("page.html.jinja")
