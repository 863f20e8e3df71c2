"""Boxes and points in answers to learn: whether their coordinates can be relative ones, from 0 to 1000.

Pixels instead are learnt without any error, and are wrong wherever a picture has another size or is resized.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..app.boxes import SCALE

PLACE = re.compile(r'"(bbox_2d|point_2d)"\s*:\s*\[([-+0-9.,\s]*)\]')
NUMBERS = {"bbox_2d": 4, "point_2d": 2}
SUSPICIOUS = math.log(1e-6)  # a chance as small as this is none


@dataclass(frozen=True)
class Places:
    """The boxes and points of some answers.

    Attributes:
        fault: what is wrong with the first that cannot be relative; None if all can.
        num_places: of pictures whose size is known.
        num_beyond: those that would lie beyond their picture if they were pixels.
        log_chance: of the chance that relative places, evenly spread, all lie within their pictures' own pixels.
    """

    fault: str | None = None
    num_places: int = 0
    num_beyond: int = 0
    log_chance: float = 0.0

    def __add__(self, other: "Places") -> "Places":
        """The places of both."""
        return Places(
            self.fault or other.fault,
            self.num_places + other.num_places,
            self.num_beyond + other.num_beyond,
            self.log_chance + other.log_chance,
        )

    @property
    def are_pixels(self) -> bool:
        """Whether they look like pixels: all within their pictures' sizes, where chance would not keep them."""
        return not self.num_beyond and self.log_chance < SUSPICIOUS


def places_in(answers: Iterable[str], size: tuple[int, int] | None) -> Places:
    """The places of answers about a picture of `size`, in pixels; None where it is not known which picture is meant.

    Only the longer side counts, for a picture may yet be turned.
    """
    side, found = min(max(size or (SCALE,)), SCALE), Places()
    for answer in answers:
        for kind, listed in PLACE.findall(answer):
            found += Places(fault_of(kind, listed))
            if found.fault is None and side < SCALE:
                is_beyond = max(map(float, listed.split(","))) > side
                found += Places(None, 1, int(is_beyond), 2 * math.log(side / SCALE))
    return found


def fault_of(kind: str, listed: str) -> str | None:
    """Why the numbers of a place cannot be relative; None if they can."""
    try:
        numbers = [float(number) for number in listed.split(",")]
    except ValueError:
        return f"`{kind}` [{listed}] is no list of numbers"
    if len(numbers) != NUMBERS[kind]:
        return f"`{kind}` [{listed}] must have {NUMBERS[kind]} numbers"
    if not 0 <= min(numbers) <= max(numbers) <= SCALE:
        return f"`{kind}` [{listed}] must be from 0 to {SCALE}, relative to the picture's sides; pixels are not"
    if kind == "bbox_2d" and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
        return f"`{kind}` [{listed}] must be left, top, right, bottom"
    return None


__all__ = ["Places", "places_in"]
