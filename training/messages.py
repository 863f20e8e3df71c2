"""The content of a chat: its messages in one form, and its pictures and videos, wherever they are stored."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..media_bard_vl import Media, local_path, open_picture, read_picture
from ..messages_bard_vl import as_list, normalize_messages

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
FORMS = ("messages", "conversations", "texts", "prompt")  # columns, one of which every chat has
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BrokenChat(ValueError):
    """A chat that cannot be trained on: a `reason` to count it by, and the `detail` that names the value."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_messages(example: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, list[Media]]]:
    """Messages up to the last assistant turn without their pictures, and the pictures by kind, in the order shown.

    Raises:
        BrokenChat: the messages are malformed, there is no assistant turn, or columns and items differ in number.
    """
    messages = as_list(messages_of(example))
    if not isinstance(messages, list) or not messages:
        raise BrokenChat("malformed messages", f"`messages` must be a list with something in it, got {messages!r:.80}")
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if not all(isinstance(role, str) for role in roles):
        raise BrokenChat("malformed messages", f"a message must be a mapping with a role, got {messages!r:.80}")
    weights = [message.get("weight") for message in messages]
    for weight in weights:
        if weight not in (None, 0, 1):
            raise BrokenChat("malformed messages", f"the `weight` of a message must be 0 or 1, got {weight!r:.80}")
    trained = [n for n, (role, weight) in enumerate(zip(roles, weights, strict=True)) if is_trained(role, weight)]
    if not trained:
        of_weight = ", all assistant turns have `weight` 0" if "assistant" in roles else ""
        raise BrokenChat("no assistant turn", f"the roles are {roles!r:.80}{of_weight}")
    columns = {kind: column_of(example, f"{kind}s") for kind in PLACEHOLDERS}
    waiting = {kind: iter(column) for kind, column in columns.items()}
    sources: dict[str, list[Media]] = {kind: [] for kind in PLACEHOLDERS}
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
    types = [item["type"] for message in kept[: trained[-1]] for item in message["content"]]
    return kept[: trained[-1] + 1], {kind: given[: types.count(kind)] for kind, given in sources.items()}


def is_trained(role: Any, weight: float | None) -> bool:
    """Whether a message is an answer to learn."""
    return role == "assistant" and weight != 0


def messages_of(example: Mapping[str, Any]) -> Any:
    """The messages of a chat in any of the forms that data sets have.

    `messages`; `conversations` of LLaVA and ShareGPT, {"from", "value"} each; `texts` of FineVision, {"user",
    "assistant"} each; `prompt` and `completion` of TRL, strings or messages, of which the completion alone is learnt.
    In the latter two, pictures of the columns that no message shows come first in the first question.

    Raises:
        BrokenChat: a turn has another form.
    """
    if example.get("messages") is not None:
        return example["messages"]
    turns, texts = as_list(example.get("conversations")), as_list(example.get("texts"))
    if turns is not None:
        return [of_sharegpt(turn) for turn in turns] if isinstance(turns, list) else turns
    if texts is not None:
        try:
            said = [(role, text[role]) for text in texts for role in ("user", "assistant")]
        except (TypeError, KeyError) as error:
            what = f"`texts` must hold user and assistant, got {texts!r:.80}"
            raise BrokenChat("malformed messages", what) from error
        return showing(example, [{"role": role, "content": text} for role, text in said])
    prompt, completion = as_list(example.get("prompt")), as_list(example.get("completion"))
    if prompt is None or completion is None:
        return None
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    try:
        return showing(example, [{**message, "weight": 0} for message in before] + [{**message} for message in answer])
    except TypeError as error:
        raise BrokenChat("malformed messages", f"`prompt` and `completion` hold {prompt!r:.60}") from error


def of_sharegpt(turn: Any) -> Any:
    """A turn of `conversations` as a message; the line break between a picture and the text is the form's own."""
    if not isinstance(turn, Mapping) or "role" in turn:
        return turn
    role, text = SHAREGPT_ROLES.get(str(turn.get("from"))), turn.get("value")
    if role is None or not isinstance(text, str):
        known = ", ".join(SHAREGPT_ROLES)
        raise BrokenChat("malformed messages", f"a turn needs `value`, and `from` one of {known}, got {turn!r:.80}")
    text = re.sub(r"(<image>|<video>)\n", r"\1", re.sub(r"\n(<image>|<video>)$", r"\1", text))
    return {"role": role, "content": text, **({"weight": turn["weight"]} if turn.get("weight") is not None else {})}


def showing(example: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, where none shows the pictures of the columns with these in front of the first question."""
    first = next((message for message in messages if message.get("role") == "user"), None)
    for kind in ("video", "image"):
        count = len(column_of(example, f"{kind}s"))
        items = [item for message in messages for item in contents_of(message)]
        shown = any(
            PLACEHOLDERS[kind] in item if isinstance(item, str) else item.get("type") == kind
            for item in items
            if isinstance(item, str | Mapping)
        )
        if count and first is not None and not shown:
            first["content"] = [{"type": kind}] * count + contents_of(first)
    return messages


def contents_of(message: Mapping[str, Any]) -> list[Any]:
    """The content of a message as a list, a string as its only item."""
    content = as_list(message.get("content"))
    return content if isinstance(content, list) else [content]


def column_of(example: Mapping[str, Any], name: str) -> list[Any]:
    """The column `images` or `videos` of an example as a list, empty if it is missing; one picture needs no list.

    Other forms than `messages` may have it as `image` or `video`.
    """
    value = example.get(name)
    if value is None and example.get("messages") is None:
        value = example.get(name.removesuffix("s"))
    if value is None:
        return []
    return [one for one in value if one is not None] if isinstance(value, (list, tuple)) else [value]


def items_of(message: Mapping[str, Any], kinds: list[str]) -> list[dict[str, Any]]:
    """The content of a message as items; a string's placeholders of `kinds` become items."""
    content = message.get("content")
    if isinstance(content, str):
        marks = {PLACEHOLDERS[kind]: kind for kind in kinds}
        parts = re.split("|".join(f"({re.escape(mark)})" for mark in marks) or "$^", content)
        content = [{"type": marks[part]} if part in marks else part for part in parts if part]
    try:
        return normalize_messages([{**message, "content": content}])[0]["content"]
    except ValueError as error:
        raise BrokenChat("malformed messages", str(error)) from error


def read_item(
    item: dict[str, Any], waiting: dict[str, Iterator[Any]], sources: dict[str, list[Media]], is_response: bool
) -> dict[str, Any]:
    """An item as the template sees it; a picture's source goes to `sources`, taken from `waiting` if it has none."""
    kind = item["type"]
    if kind == "text":
        return {"type": "text", "text": item["text"]}
    if is_response:
        raise BrokenChat("malformed messages", f"an assistant turn shows an {kind}, which nothing can generate")
    source = item[kind] if kind in item else Media(next(waiting[kind], None))
    if source.source is None:
        raise BrokenChat(f"{kind} count", f"the messages show more {kind}s than `{kind}s` holds")
    sources[kind].append(source)
    return {"type": kind}


def open_image(source: Any, folder: Path) -> Image.Image:
    """A picture whose size is known and whose pixels are not decoded yet.

    Raises:
        BrokenChat: there is no such file, or no picture in it.
    """
    try:
        return open_picture(fetched(source), folder)
    except ValueError as error:
        raise broken("image", error) from error


def decode_image(image: Image.Image) -> Image.Image:
    """The picture as inference reads it.

    Raises:
        BrokenChat: its data ends early, or is no picture.
    """
    try:
        return read_picture(image)
    except ValueError as error:
        raise broken("image", error) from error


def open_video(video: Media, folder: Path) -> Media:
    """A video as `BardVLProcessor` takes it, with its path whole, or its frames as pictures.

    Raises:
        BrokenChat: there is no such file, or a form that is not known.
    """
    source = video.source
    if isinstance(source, Mapping) and not source.get("bytes"):  # of `datasets.Video`
        source = source.get("path")
    if isinstance(source, (list, tuple)) and source:
        return Media([decode_image(open_image(frame, folder)) for frame in source], video.options)
    if isinstance(source, (str, os.PathLike)) and not str(source).startswith(("http://", "https://", "data:")):
        path = local_path(os.fspath(source), folder)
        if not path.exists():
            raise BrokenChat("missing video", str(path))
        return Media(str(path), video.options)
    if isinstance(source, (str, bytes, Mapping)) or getattr(source, "ndim", 0) == 4:
        return Media(source, video.options)
    raise BrokenChat("broken video", f"a path, an address or a list of frames is needed, got {source!r:.80}")


def fetched(source: Any) -> Any:
    """The picture at an address that only `datasets` knows (hf://, s3://, ...); other sources as they are."""
    if not isinstance(source, str) or "://" not in source or source.startswith(("file:", "http:", "https:", "data:")):
        return source
    try:
        return datasets.Image().decode_example({"path": source, "bytes": None})
    except Exception as error:  # what its file systems raise has no common class
        raise BrokenChat("broken image", f"{source}: {error}") from error


def broken(kind: str, error: ValueError) -> BrokenChat:
    """The broken chat that an unreadable picture makes."""
    if isinstance(error.__cause__, FileNotFoundError):
        return BrokenChat(f"missing {kind}", str(error).partition(" cannot be read")[0])
    return BrokenChat(f"broken {kind}", str(error))
