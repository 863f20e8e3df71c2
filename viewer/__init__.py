"""Denoising made visible: a recording of a generation as a page that plays it, an animation, or a picture."""

from .page import html_of, write_html
from .picture import write_gif, write_png
from .recording import RecordedStep, Recording

__all__ = ["RecordedStep", "Recording", "html_of", "write_gif", "write_html", "write_png"]
