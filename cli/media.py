"""Pictures, pages and videos that a command line names."""

from pathlib import Path
from typing import Any

from bard_vl.app.documents import is_document, read_page, split_pages
from bard_vl.media_bard_vl import open_picture, read_picture, read_video

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg")


def expand(places: list[str]) -> list[str]:
    """The places with a PDF as the places of its pages."""
    return [page for place in places for page in (split_pages(place) if is_document(place) else [place])]


def read(place: str, processor: Any) -> dict[str, Any]:
    """A picture, page or video as an item of a message's content; `ValueError` if it cannot be read."""
    if is_document(place):
        return {"type": "image", "image": read_page(place)}
    if is_video(place):
        return {"type": "video", "video": read_video(place, processor.video_processor.sample_frames)}
    return {"type": "image", "image": read_picture(place)}


def is_video(place: str) -> bool:
    """Whether a path or address is meant as a video: a folder of frames, a GIF that moves, or by its suffix."""
    if not place.startswith(("http://", "https://", "data:")) and Path(place).is_dir():
        return True
    name = place.partition("?")[0].lower()
    if name.endswith(".gif"):
        return getattr(open_picture(place), "is_animated", False)
    return name.endswith(VIDEO_SUFFIXES)
