"""The rows of an input of any kind, as requests."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet

from ..app.chats import check_chat, is_text
from ..app.errors import UsageError, one_line
from ..media_bard_vl import PICTURE_SUFFIXES, read_picture, unreadable
from ..messages_bard_vl import normalize_messages
from . import files

LINES, TABLE, PICTURES, HUB = "JSONL", "parquet", "pictures", "Hub"
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2")
MEMBERS = ("id", "prompt", "image", "images", "messages")  # of a request
QUESTION = "Describe the picture."  # about pictures of a folder
ROWS_OF_PIECE = 1000  # of a folder of pictures or a data set
ROWS_READ = 64  # of a table at a time: pictures may be in it
Record = dict[str, Any]


@dataclass
class Request:
    """A row of the input.

    Attributes:
        row: its number over all files, from 1; of a JSONL file that of the line, empty ones counted.
        id: what it calls itself, else its number.
        body: its members.
        folder: where relative paths start.
        fault: why it cannot be asked at all.
    """

    row: int
    id: Any
    body: Record = field(default_factory=dict)
    folder: str = ""
    fault: str | None = None

    def answer(self, **found: Any) -> Record:
        """The answer as it is stored."""
        return {"row": self.row, "id": self.id, **found}


@dataclass(frozen=True)
class Asking:
    """The settings of all requests of an input.

    Attributes:
        prompt: the question of rows that have none.
        system: what precedes every chat that has no system prompt.
        columns: per member of a request, the column that has it.
    """

    prompt: str | None = None
    system: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def rename(self, body: Record) -> Record:
        """A row with its columns under the names of a request; empty ones of a table are left out."""
        return body | {name: body.get(column) for name, column in self.columns.items()} if self.columns else body


@dataclass(frozen=True)
class Piece:
    """A part of the input that one task reads.

    Attributes:
        kind: JSONL, parquet, pictures or Hub.
        place: file, folder or data set.
        names: pictures in the folder; configuration and split of a data set.
        start, stop: rows of the data set.
        first: number of rows in the pieces before it.
        count: rows in it.
    """

    kind: str
    place: str
    names: tuple[str, ...] = ()
    start: int = 0
    stop: int = 0
    first: int = 0
    count: int = 0


def find_pieces(place: str, config: str | None = None, split: str = "train") -> list[Piece]:
    """The parts of an input in order; `UsageError` if nothing can be asked from it."""
    place = files.anywhere(place)
    name = place.lower()
    if name.endswith(LINE_SUFFIXES) and files.kind_of(place) == "file":
        return [Piece(LINES, place)]
    if name.endswith(".parquet") and files.kind_of(place) == "file":
        return [Piece(TABLE, place)]
    if files.kind_of(place) == "folder":
        return pieces_of_folder(place)
    if files.kind_of(place) == "file":
        raise UsageError(f"{place} is no {', '.join(LINE_SUFFIXES)} or .parquet file, and no folder")
    if files.is_remote(place) or place.count("/") != 1 or place.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{place}: no such file or folder")
    names, rows = (config or "", split), len(hub_dataset(place, config or "", split))
    starts = range(0, rows, ROWS_OF_PIECE)
    return [Piece(HUB, place, names, start, min(start + ROWS_OF_PIECE, rows)) for start in starts]


def pieces_of_folder(place: str) -> list[Piece]:
    """JSONL files, parquet files or pictures of a folder; `UsageError` if it has none, or several kinds."""
    names = [name for name, _ in files.list_files(place, recursive=True) if not hidden(name)]
    kinds = {
        LINES: [name for name in names if name.lower().endswith(LINE_SUFFIXES)],
        TABLE: [name for name in names if name.lower().endswith(".parquet")],
    }
    pictures = [name for name in names if name.lower().endswith(PICTURE_SUFFIXES)]
    found = [kind for kind in kinds if kinds[kind]] or ([PICTURES] if pictures else [])
    if len(found) != 1:
        raise UsageError(f"{place} has {' and '.join(found) or 'no JSONL file, parquet file or picture'} in it")
    if found == [PICTURES]:
        return [
            Piece(PICTURES, place, tuple(pictures[start : start + 1000])) for start in range(0, len(pictures), 1000)
        ]
    return [Piece(found[0], files.beside(name, place)) for name in kinds[found[0]]]


def hidden(name: str) -> bool:
    """Whether readers of folders pass over a file: one of its names begins with a point or an underscore."""
    return any(part.startswith((".", "_")) for part in name.split("/"))


@functools.lru_cache(maxsize=1)
def hub_dataset(name: str, config: str, split: str) -> Any:
    """A split of a data set of the Hub, its pictures as they are stored; `UsageError` without `datasets`."""
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise UsageError(f'{name} is no file or folder; data sets of the Hub need "bard-vl[batch]"') from error
    try:
        dataset = load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        raise OSError(f"{name} is no file or folder, and cannot be had from the Hub: {one_line(error)}") from error
    pictures = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
    for column in pictures:
        dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


# Rows ----------------------------------------------------------------------------------------------------------------


def read_requests(piece: Piece, asking: Asking) -> Iterator[Request]:
    """The requests of a piece in order; one that cannot be asked has a fault."""
    if piece.kind == LINES:
        folder = piece.place.rpartition("/")[0]
        for number, line in enumerate(files.read_lines(piece.place), piece.first + 1):
            if line.strip():
                yield read_line(number, line, asking, folder)
        return
    for number, body in enumerate(read_bodies(piece), piece.first + 1):
        body = {name: value for name, value in asking.rename(body).items() if name in MEMBERS and value is not None}
        request = Request(number, body.get("id", number), body, "" if piece.kind == HUB else folder_of(piece))
        if not is_id(request.id):
            request.fault = f"row {number}: `id` must be a text or a number, got {request.id!r:.80}"
        yield request


def read_bodies(piece: Piece) -> Iterator[Record]:
    """The rows of a table, a data set or a folder of pictures."""
    if piece.kind == PICTURES:
        yield from ({"id": name, "image": name} for name in piece.names)
    elif piece.kind == HUB:
        dataset = hub_dataset(piece.place, *piece.names)
        for start in range(piece.start, piece.stop, ROWS_READ):
            rows = dataset.with_format("arrow")[start : min(start + ROWS_READ, piece.stop)]
            yield from rows.to_pylist()
    else:
        with files.open_file(piece.place) as file:
            for rows in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=ROWS_READ):
                yield from rows.to_pylist()


def folder_of(piece: Piece) -> str:
    """The folder at which relative paths of a piece start."""
    return piece.place if piece.kind == PICTURES else piece.place.rpartition("/")[0]


def read_line(number: int, line: bytes, asking: Asking, folder: str = "") -> Request:
    """The request of a line of JSON."""
    try:
        body = json.loads(line.decode("utf-8-sig"), parse_constant=refuse_constant)
        is_whole = is_text(json.dumps(body, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        return Request(number, number, fault=f"line {number}: no JSON object: {one_line(error)}")
    if not isinstance(body, dict):
        return Request(number, number, fault=f"line {number}: no JSON object, but {body!r:.80}")
    body = asking.rename(body)
    request = Request(number, body.get("id", number), body, folder)
    if not is_id(request.id):
        request.fault = f"line {number}: `id` must be a text or a number, got {request.id!r:.80}"
    elif not is_whole:
        request.fault = f"line {number}: half a character (U+D800 to U+DFFF), which is no text"
    return request


def is_id(value: Any) -> bool:
    """Whether it is a text or a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return is_number or isinstance(value, str)


def refuse_constant(name: str) -> None:
    """Refuse what Python would take for a number."""
    raise ValueError(f"{name} is no JSON")


def as_chat(request: Request, asking: Asking) -> list[Record]:
    """A request's messages; pictures are opened here, so that a broken one is known by its request.

    Raises:
        ValueError: the request is no question, or a picture cannot be read.
    """
    body = request.body
    if "messages" in body:
        check_chat(body["messages"])
        messages = normalize_messages(body["messages"])
    else:
        messages = [{"role": "user", "content": question(body, asking)}]
        messages = normalize_messages(messages)
    for message in messages:
        message["content"] = [open_item(item, request.folder) for item in message["content"]]
    if asking.system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": asking.system}]})
    return messages


def question(body: Record, asking: Asking) -> list[Record]:
    """Pictures and a prompt as the content of a message; `ValueError` if they are none."""
    if "prompt" not in body and asking.prompt is None:
        raise ValueError("the request has neither `prompt` nor `messages`")
    prompt = body.get("prompt", asking.prompt)
    images = body.get("images", [body["image"]] if "image" in body else [])
    if not isinstance(prompt, str):
        raise ValueError(f"`prompt` must be a text, got {prompt!r:.80}")
    if not isinstance(images, list) or not all(isinstance(image, str | bytes | dict) for image in images):
        raise ValueError(f"`images` must be a list of paths, got {images!r:.80}")
    return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]


def open_item(item: Record, folder: str) -> Record:
    """An item of a message with its picture opened, or with its video where it can be opened from."""
    media = item.get(item["type"])
    if item["type"] == "text" or media is None:
        return item
    source = media.source
    if isinstance(source, Mapping):  # of a table: bytes, or the path of a file
        source = source.get("bytes") or source.get("path") or source
    if isinstance(source, str):
        source = fetch(source, folder, item["type"])
    if item["type"] == "image":
        source = read_picture(source, folder)
    elif isinstance(source, str):
        source = files.beside(source, folder)
    return {"type": item["type"], item["type"]: source, **media.options}


def fetch(source: str, folder: str, kind: str) -> str | bytes:
    """The bytes of an object in a store, named by its address or relative to one; any other source as it is."""
    place = files.beside(source, folder) if files.is_remote(folder) else source
    if not files.is_remote(place):
        return source
    try:
        with files.open_file(place) as file:
            return file.read()
    except Exception as error:  # of the file systems
        raise unreadable(place, "picture" if kind == "image" else kind, error) from error


# Inventory -----------------------------------------------------------------------------------------------------------


@dataclass
class Inventory:
    """Facts about an input, known before anything is asked.

    Attributes:
        pieces: with the rows before them counted.
        rows: (requests,) their numbers, in order.
        ids: (requests,) a fingerprint of each id.
        repeats: per row whose id is that of an earlier one, the number of that.
        digest: of everything that is asked.
    """

    pieces: list[Piece]
    rows: np.ndarray
    ids: np.ndarray
    repeats: dict[int, int]
    digest: str


def take_stock(pieces: list[Piece], asking: Asking) -> Inventory:
    """Read an input once: count it, and find ids that come again."""
    rows: list[int] = []
    ids: list[int] = []
    digest, counted, first = hashlib.sha256(repr(asking).encode()), [], 0
    for piece in pieces:
        piece = Piece(piece.kind, piece.place, piece.names, piece.start, piece.stop, first)
        before = len(rows)
        count = (
            count_lines(piece, asking, rows, ids, digest)
            if piece.kind == LINES
            else count_rows(piece, asking, rows, ids, digest)
        )
        if len(rows) > before:
            counted.append(Piece(piece.kind, piece.place, piece.names, piece.start, piece.stop, first, count))
        first += count
    numbers, prints = np.array(rows, dtype=np.int64), np.array(ids, dtype=np.uint64)
    return Inventory(counted, numbers, prints, find_repeats(numbers, prints), digest.hexdigest())


def count_lines(piece: Piece, asking: Asking, rows: list[int], ids: list[int], digest: Any) -> int:
    """Lines of a JSONL file; notes row and id of each that is not empty."""
    count = 0
    for count, line in enumerate(files.read_lines(piece.place), 1):
        if line.strip():
            request = read_line(piece.first + count, line, asking)
            rows.append(request.row)
            ids.append(0 if request.fault else fingerprint(request.id))
            digest.update(line + b"\n")
    return count


def count_rows(piece: Piece, asking: Asking, rows: list[int], ids: list[int], digest: Any) -> int:
    """Rows of a table, data set or folder, of which the ids alone are read; notes row and id of each."""
    column = asking.columns.get("id", "id")
    found: list[Any] = []
    if piece.kind == PICTURES:
        found = list(piece.names)
        digest.update(repr((piece.place, piece.names)).encode())
    elif piece.kind == HUB:
        dataset = hub_dataset(piece.place, *piece.names)
        found = [None] * (piece.stop - piece.start)
        if column in dataset.column_names:
            found = dataset.select_columns(column)[piece.start : piece.stop][column]
        digest.update(repr((dataset._fingerprint, piece.start, found)).encode())
    else:
        with files.open_file(piece.place) as file:
            table = pyarrow.parquet.ParquetFile(file)
            found = [None] * table.metadata.num_rows
            if column in table.schema_arrow.names:
                found = table.read(columns=[column])[column].to_pylist()
            digest.update(repr((os.path.basename(piece.place), file.size(), str(table.schema_arrow), found)).encode())
    for number, value in enumerate(found, piece.first + 1):
        rows.append(number)
        ids.append(fingerprint(number if value is None else value) if value is None or is_id(value) else 0)
    return len(found)


def fingerprint(value: Any) -> int:
    """A number of 64 bits that stands for an id, never 0: 3 and "3" are two ids, 3 and 3.0 one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big") | 1


def find_repeats(rows: np.ndarray, ids: np.ndarray) -> dict[int, int]:
    """Rows whose id an earlier row has, with the number of the first one; 0 is no id."""
    order = np.argsort(ids, kind="stable")
    ordered, begins = ids[order], np.ones(len(ids), dtype=bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    firsts = rows[order][np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))] if len(ids) else rows
    again = ~begins & (ordered != 0)
    return dict(zip(rows[order][again].tolist(), firsts[again].tolist(), strict=True))


def open_requests(piece: Piece, asking: Asking, done: np.ndarray, repeats: dict[int, int]) -> Iterator[Request]:
    """The requests of a piece that have no answer yet."""
    low, high = np.searchsorted(done, [piece.first + 1, piece.first + piece.count + 1])
    skipped = set(done[low:high].tolist())
    for request in read_requests(piece, asking):
        if request.row in skipped:
            continue
        if request.fault is None and request.row in repeats:
            word = "line" if piece.kind == LINES else "row"
            request.fault = f"{word} {request.row}: `id` {request.id!r:.80} is that of {word} {repeats[request.row]}"
        yield request
