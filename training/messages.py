"""What a chat holds: its messages in one form, and its pictures and videos from wherever they lie."""

import base64
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from transformers.image_utils import load_image

from ..processing_bard_vl import normalize_messages

URL_TIMEOUT_S = 60.0
PLACEHOLDERS = {"image": "<image>", "video": "<video>"}


class BrokenChat(ValueError):
    """A chat that cannot be trained on: a `reason` to count it by, and the `detail` that names the value."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_messages(example: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Messages up to the last assistant turn without their pictures, and the pictures by kind, in the order shown.

    Raises:
        BrokenChat: the messages are malformed, there is no assistant turn, or columns and items differ in number.
    """
    messages = example.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BrokenChat("malformed messages", f"`messages` must be a list with something in it, got {messages!r:.80}")
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if not all(isinstance(role, str) for role in roles):
        raise BrokenChat("malformed messages", f"a message must be a mapping with a role, got {messages!r:.80}")
    if "assistant" not in roles:
        raise BrokenChat("no assistant turn", f"the roles are {roles!r:.80}")
    columns = {kind: column_of(example, f"{kind}s") for kind in PLACEHOLDERS}
    waiting = {kind: iter(column) for kind, column in columns.items()}
    sources: dict[str, list[Any]] = {kind: [] for kind in PLACEHOLDERS}
    kept = []
    for number, message in enumerate(messages):
        content = []
        for item in items_of(message, [kind for kind, column in columns.items() if column]):
            content.append(read_item(item, waiting, sources, is_response=roles[number] == "assistant"))
        others = {key: value for key, value in message.items() if value is not None}
        kept.append({**others, "content": content})
    for kind, left in waiting.items():
        num_left = sum(1 for _ in left)
        if num_left:
            given = len(columns[kind])
            raise BrokenChat(f"{kind} count", f"the messages show {given - num_left} of the {given} in `{kind}s`")
    last = max(number for number, role in enumerate(roles) if role == "assistant")
    types = [item["type"] for message in kept[:last] for item in message["content"]]
    return kept[: last + 1], {kind: given[: types.count(kind)] for kind, given in sources.items()}


def column_of(example: Mapping[str, Any], name: str) -> list[Any]:
    """The column `images` or `videos` of an example as a list, empty if it is missing; one picture may stand alone."""
    value = example.get(name)
    if value is None:
        return []
    return [one for one in value if one is not None] if isinstance(value, (list, tuple)) else [value]


def items_of(message: Mapping[str, Any], kinds: list[str]) -> Iterator[dict[str, Any]]:
    """The content of a message as items without empty members; a string's placeholders of `kinds` become items.

    Arrow tables give every item the members of all others, as None.
    """
    content = message.get("content")
    if content is None:
        return
    if isinstance(content, str):
        marks = {PLACEHOLDERS[kind]: kind for kind in kinds}
        for part in re.split("|".join(f"({re.escape(mark)})" for mark in marks) or "$^", content):
            if part in marks:
                yield {"type": marks[part]}
            elif part:
                yield {"type": "text", "text": part}
        return
    if not isinstance(content, (list, tuple)) or not all(isinstance(item, (str, Mapping)) for item in content):
        raise BrokenChat("malformed messages", f"a content must be a string or a list of items, got {content!r:.80}")
    for item in content:
        present = {"text": item} if isinstance(item, str) else {k: v for k, v in item.items() if v is not None}
        yield from normalize_messages([{"content": [present]}])[0]["content"]


def read_item(
    item: dict[str, Any], waiting: dict[str, Iterator[Any]], sources: dict[str, list[Any]], is_response: bool
) -> dict[str, Any]:
    """What the template sees of an item; a picture's source goes to `sources`, taken from `waiting` if it has none."""
    kind = item["type"]
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind not in sources:
        raise BrokenChat("malformed messages", f"a content item must be a text, an image or a video, got {item!r:.80}")
    if is_response:
        raise BrokenChat("malformed messages", f"an assistant turn shows an {kind}, which nothing can generate")
    source = next((item[key] for key in (kind, "url", "path", "base64") if key in item), None)
    if source is None:
        source = next(waiting[kind], None)
    if source is None:
        raise BrokenChat(f"{kind} count", f"the messages show more {kind}s than `{kind}s` holds")
    rate = item.get("sample_fps", item.get("fps"))
    sources[kind].append((source, rate) if kind == "video" else source)
    return {"type": kind}


def open_image(source: Any, folder: Path) -> Image.Image:
    """A picture whose size is known and whose pixels are not decoded yet, but for addresses in the network.

    Raises:
        BrokenChat: there is no such file, or no picture in it.
    """
    if isinstance(source, Mapping):  # of `datasets.Image`
        source = source.get("bytes") or source.get("path")
    try:
        if isinstance(source, Image.Image):
            return source
        if isinstance(source, bytes):
            return Image.open(io.BytesIO(source))
        if isinstance(source, str) and source.startswith("data:"):
            return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            return load_image(source, timeout=URL_TIMEOUT_S)
        if isinstance(source, str) and "://" in source:
            return datasets.Image().decode_example({"path": source, "bytes": None})
        if isinstance(source, (str, os.PathLike)):
            return Image.open(folder / source)
    except FileNotFoundError as error:
        raise BrokenChat("missing image", str(folder / source)) from error
    except Exception as error:  # what Pillow's decoders and the libraries of the network raise has no common class
        raise BrokenChat("broken image", f"{source!r:.80}: {error}") from error
    raise BrokenChat("broken image", f"a path, an address, bytes or a Pillow image is needed, got {source!r:.80}")


def decode_image(image: Image.Image) -> Image.Image:
    """The picture upright and in RGB, as transformers reads it for inference.

    Raises:
        BrokenChat: its data ends early, or is no picture.
    """
    try:
        return load_image(image)
    except Exception as error:  # as above
        raise BrokenChat("broken image", f"{getattr(image, 'filename', '') or image!r}: {error}") from error


def open_video(source: tuple[Any, float | None], folder: Path) -> Any:
    """A video as `BardVLProcessor` takes it: an address, which it samples, or the pair of all frames and metadata.

    Frames stand `fps` (2 by default, as in qwen_vl_utils) to a second.

    Raises:
        BrokenChat: there is no such file, or a form that is not known.
    """
    video, rate = source
    if isinstance(video, Mapping) and not video.get("bytes"):  # of `datasets.Video`
        video = video.get("path")
    if isinstance(video, (list, tuple)) and video:
        frames = [decode_image(open_image(frame, folder)) for frame in video]
        metadata = {"fps": rate or 2.0, "frames_indices": list(range(len(frames))), "total_num_frames": len(frames)}
        return frames, metadata
    if isinstance(video, str) and "://" in video:
        return video
    if isinstance(video, (str, os.PathLike)):
        if not (folder / video).is_file():
            raise BrokenChat("missing video", str(folder / video))
        return str(folder / video)
    raise BrokenChat("broken video", f"a path, an address or a list of frames is needed, got {video!r:.80}")
