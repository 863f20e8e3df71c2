"""Pages of a PDF as pictures, by pypdfium2."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

from PIL import Image

from ..media_bard_vl import file_of
from .errors import UsageError, one_line

PLACE = re.compile(r"(?P<file>.+\.pdf)(?:#(?P<first>\d*)(?P<dash>-?)(?P<last>\d*))?", re.IGNORECASE | re.DOTALL)
MOST_PAGES = 32  # of one document at a time
DOTS_PER_INCH = 144  # a page of A4 has 1190 x 1684 pixels; the processor makes it smaller where that is too many


def is_document(place: str) -> bool:
    """Whether a path or address is meant as a PDF: `file.pdf`, `file.pdf#2`, `file.pdf#2-4` or `file.pdf#2-`."""
    return PLACE.fullmatch(place) is not None


def split_pages(place: str) -> list[str]:
    """A place for each page of a PDF: `file.pdf#2`, `file.pdf#3`, ...

    Raises:
        UsageError: pypdfium2 is missing, the document lacks a page, or it has more than `MOST_PAGES`.
        ValueError: it cannot be read.
    """
    found = PLACE.fullmatch(place)
    assert found is not None
    with open_document(found["file"]) as document:
        count = len(document)
    first = int(found["first"] or 1)
    last = int(found["last"] or (count if found["dash"] or not found["first"] else first))
    if not 1 <= first <= last <= count:
        raise UsageError(f"{place}: there are pages 1 to {count}")
    if last - first >= MOST_PAGES:
        raise UsageError(
            f"{place} has {last - first + 1} pages, {MOST_PAGES} at a time are read at most: name some, for instance "
            f"{found['file']}#{first}-{first + MOST_PAGES - 1}"
        )
    return [f"{found['file']}#{number}" for number in range(first, last + 1)]


def read_page(place: str) -> Image.Image:
    """A page that `split_pages` names, as a picture; `ValueError` if it cannot be read."""
    name, _, number = place.rpartition("#")
    with open_document(name) as document:
        try:
            return document[int(number) - 1].render(scale=DOTS_PER_INCH / 72).to_pil().convert("RGB")
        except Exception as error:  # of PDFium, which has no common class
            raise ValueError(f"cannot read the page {place}: {one_line(error)}") from error


@contextlib.contextmanager
def open_document(name: str) -> Iterator[Any]:
    """A PDF, for as long as the context lasts."""
    if importlib.util.find_spec("pypdfium2") is None:
        raise UsageError(f'{name}: PDFs need pypdfium2: pip install "bard-vl[pdf]"')
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(file_of(name))
    except Exception as error:  # of PDFium, of files, of addresses
        raise ValueError(f"cannot read the document {name}: {one_line(error)}") from error
    try:
        yield document
    finally:
        document.close()
