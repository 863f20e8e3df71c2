"""Chats in one form, from any that is known: every content a list of texts, pictures and videos.

A template of transformers 4.57 drops what it does not know, later ones refuse some of it: here all of it is taken or
refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .media_bard_vl import OPTIONS, Media

KINDS = ("image", "video", "text")
ADDRESSES = {"image_url": "image", "video_url": "video"}  # of OpenAI's form: the text, or a mapping with `url`
FOREIGN = ("audio", "audio_url", "input_audio", "document", "file")  # what other models take
PLACES = ("url", "path", "base64", "bytes")  # where the source may be if the type is stated


def normalize_messages(conversation: Any) -> list[Any]:
    """Messages, or a list of conversations, in one form; nothing is changed in place.

    Every content is a list of `{"type": "text", "text": str}` and `{"type": kind, kind: Media}`, the latter without
    `kind` where the picture or video comes elsewhere. Members that are None, as Arrow tables have them, are left out.

    Raises:
        ValueError: there is no message, or one that is no message.
    """
    conversation = as_list(getattr(conversation, "messages", conversation))
    if not isinstance(conversation, list) or not conversation:
        raise ValueError(f"messages must be a list with something in it, got {conversation!r:.80}")
    return [
        normalize_messages(message) if is_conversation(message) else normalize_message(message)
        for message in conversation
    ]


def is_conversation(value: Any) -> bool:
    """Whether it is one of several conversations, not a message."""
    return isinstance(as_list(value), list) or hasattr(value, "messages")


def as_list(value: Any) -> Any:
    """A sequence of objects as a list, as tables of pandas and Arrow hold them; anything else as it is."""
    if isinstance(value, tuple) or type(value).__name__ in ("ndarray", "Series"):
        return list(value)
    return value


def as_mapping(value: Any) -> Any:
    """A message or item as a mapping without members that are None, from one, a dataclass or a pydantic model."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {name: member for name, member in value.items() if member is not None}
    return value


def normalize_message(message: Any) -> dict[str, Any]:
    """A message with its content as a list of items."""
    message = as_mapping(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message must be a mapping with a role, got {message!r:.80}")
    content = as_list(message.get("content", []))
    if isinstance(content, str):
        content = [content]
    items: list[Any] = [as_mapping(item) for item in content] if isinstance(content, list) else [None]
    if not all(isinstance(item, (str, dict)) for item in items):
        raise ValueError(f"a content must be a string or a list of items, got {content!r:.80}")
    return {**message, "content": [normalize_item(item) for item in items]}


def normalize_item(item: str | dict[str, Any]) -> dict[str, Any]:
    """An item of a content with its type stated and its source, if it has one, under that name."""
    if isinstance(item, str):
        return {"type": "text", "text": item}
    members = {ADDRESSES.get(name, name): member for name, member in item.items()}
    shown = [kind for kind in KINDS if kind in members and not (isinstance(members[kind], str) and not members[kind])]
    stated = members["type"] if "type" in members else shown[0] if shown else "text" if "text" in members else None
    kind = ADDRESSES.get(stated, stated) if isinstance(stated, str) else stated
    if kind not in KINDS or any(name in members for name in FOREIGN):
        raise ValueError(f"a content item must be a text, an image or a video, got {item!r:.80}")
    if shown not in ([], [kind]):
        raise ValueError(f"a content item must be one of {', '.join(shown)}, got all of them: {item!r:.80}")
    if kind == "text":
        if not isinstance(members.get("text"), str):
            raise ValueError(f"the text of a content item must be a string, got {item!r:.80}")
        return {**item, "type": "text"}
    if kind not in shown:
        place = next((name for name in PLACES if name in members), None)
        if place is None:
            return {"type": kind}
        members[kind] = f"data:;base64,{members[place]}" if place == "base64" else members[place]
    return {"type": kind, kind: Media(members[kind], {name: item[name] for name in OPTIONS if name in item})}
