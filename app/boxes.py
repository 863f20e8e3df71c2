"""Boxes and points in pictures, as Qwen3-VL writes them: JSON with coordinates from 0 to 1000, relative to the picture.

`bbox_2d` is left, top, right, bottom; `point_2d` is x, y; each goes from 0 to 1000 along its own side, whatever the
picture's shape and however it was resized for the model.
"""

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

SCALE = 1000  # what a whole side counts
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
LONGEST_LABEL = 40  # characters


def things_schema(kind: str = "bbox_2d", labels: list[str] | None = None, most: int | None = None) -> dict[str, Any]:
    """The JSON schema of a list of things with boxes (`bbox_2d`) or points (`point_2d`), for `structured`.

    Args:
        kind: `bbox_2d` or `point_2d`.
        labels: what a thing may be called; any text by default.
        most: things at most.
    """
    if kind not in ("bbox_2d", "point_2d"):
        raise ValueError(f"`kind` must be bbox_2d or point_2d, got {kind!r}")
    count = 4 if kind == "bbox_2d" else 2
    number = {"type": "integer", "minimum": 0, "maximum": SCALE}
    place = {"type": "array", "items": number, "minItems": count, "maxItems": count}
    label = {"enum": labels} if labels else {"type": "string", "minLength": 1, "maxLength": LONGEST_LABEL}
    thing = {"type": "object", "properties": {kind: place, "label": label}, "required": [kind, "label"]}
    return {"type": "array", "items": thing} | ({} if most is None else {"maxItems": most})


@dataclass(frozen=True)
class Thing:
    """Something in a picture.

    Attributes:
        label: what it is called.
        place: pixels from the left and from the top: left, top, right, bottom of a box, or x, y of a point.
    """

    label: str
    place: tuple[float, ...]

    @property
    def is_box(self) -> bool:
        """Whether it is a box, and no point."""
        return len(self.place) == 4

    def relative(self, width: int, height: int) -> dict[str, Any]:
        """As the model writes it, for a picture of this size in pixels."""
        sides = (width, height) * (len(self.place) // 2)
        numbers = [round(SCALE * part / side) for part, side in zip(self.place, sides, strict=True)]
        return {"bbox_2d" if self.is_box else "point_2d": numbers, "label": self.label}


def read_things(answer: Any, width: int, height: int) -> list[Thing]:
    """The things of an answer, in pixels of a picture of `width` x `height`.

    Args:
        answer: JSON, or what it says: a list of objects with `bbox_2d` or `point_2d`, or one of them.
        width: of the picture as it is drawn on, not as the model saw it.
        height: the same.

    Raises:
        ValueError: the answer is no such list; a number is not from 0 to 1000; a box ends before it begins.
    """
    try:
        given = json.loads(answer) if isinstance(answer, str) else answer
    except json.JSONDecodeError:
        raise ValueError(f"boxes and points must be JSON, got {answer!r:.80}") from None
    found = []
    for each in given if isinstance(given, list) else [given]:
        named = each if isinstance(each, dict) else {}
        numbers = named.get("bbox_2d", named.get("point_2d"))
        count = 4 if "bbox_2d" in named else 2
        if not isinstance(numbers, list) or len(numbers) != count or not all(map(is_coordinate, numbers)):
            raise ValueError(f"a thing must have `bbox_2d` or `point_2d`, {SCALE} at most each, got {each!r:.80}")
        if count == 4 and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
            raise ValueError(f"`bbox_2d` must be left, top, right, bottom, got {numbers}")
        sides = (width, height) * (count // 2)
        place = tuple(part * side / SCALE for part, side in zip(numbers, sides, strict=True))
        found.append(Thing(str(named.get("label", "")), place))
    return found


def find_things(text: str, width: int, height: int) -> list[Thing]:
    """The things of the first JSON in a text that places any; none where nothing does. See `read_things`."""
    for start in re.finditer(r"\[\s*(?={)|{", text):
        with contextlib.suppress(ValueError, RecursionError):
            found = read_things(json.JSONDecoder().raw_decode(text, start.start())[0], width, height)
            if found:
                return found
    return []


def is_coordinate(value: Any) -> bool:
    """Whether a value is a number from 0 to 1000."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= SCALE


def colours_of(things: list[Thing]) -> list[str]:
    """The colour of each thing; those of a label share one."""
    labels = list(dict.fromkeys(thing.label for thing in things))
    return [COLOURS[labels.index(thing.label) % len(COLOURS)] for thing in things]


def draw_things(picture: Image.Image, things: list[Thing]) -> Image.Image:
    """A copy of the picture with the things drawn on it, each label in a colour of its own."""
    drawn = picture.convert("RGB")
    canvas, line = ImageDraw.Draw(drawn), max(2, round(max(drawn.size) / 300))
    for thing, colour in zip(things, colours_of(things), strict=True):
        left, top = thing.place[:2]
        if thing.is_box:
            canvas.rectangle(thing.place, outline=colour, width=line)
        else:
            canvas.ellipse((left - 2 * line, top - 2 * line, left + 2 * line, top + 2 * line), fill=colour)
        if thing.label:
            box = canvas.textbbox((left + line, top + line), thing.label)
            canvas.rectangle(box, fill=colour)
            canvas.text((left + line, top + line), thing.label, fill="white")
    return drawn
