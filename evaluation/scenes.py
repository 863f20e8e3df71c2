"""Generated pictures: coloured shapes on a grid, sometimes a word, with a caption and questions about them.

A scene is a pure function of (split, seed, index). Its split is a function of what it shows, so no picture of the
held-out split is ever seen in training, whatever the seeds.
"""

import math
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GRID = 4
CELL = 64  # pixels
COLUMNS = "abcd"
COLOURS = {
    "red": "#d62728",
    "green": "#2ca02c",
    "blue": "#1f5fd0",
    "yellow": "#f2c40f",
    "purple": "#8e44ad",
    "black": "#202020",
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
RADII = {"large": 27, "small": 17}  # pixels
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "cross": [
        *((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)),
        *((0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
    ],
    "star": [
        (length * math.sin(math.pi * i / 5), -length * math.cos(math.pi * i / 5))
        for i, length in enumerate([1.0, 0.42] * 5)
    ],
}
WORDS = ("bard", "song", "tale", "poem", "moon", "rain", "snow", "wind", "tree", "leaf", "rose", "bird", "wolf", "gold")
NUMBERS = ("no", "one", "two", "three", "four", "five")
HELD_OUT_SHARE = 16  # one scene in 16 is never trained on
WORDS_ASKED = ("captions", "questions")  # whose answers take turns in `conversations`
Fact = tuple[str, ...]  # a thing as (cell, size, colour, shape), the word as (row, colour, text)


@dataclass(frozen=True)
class Thing:
    """A shape in one cell of the grid; rows and columns count from 0."""

    row: int
    column: int
    size: str
    colour: str
    shape: str

    @property
    def cell(self) -> str:
        """The name of its cell, as on a chessboard, row 1 on top."""
        return f"{COLUMNS[self.column]}{self.row + 1}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the shape, in pixels."""
        x, y, radius = (self.column + 0.5) * CELL, (self.row + 0.5) * CELL, RADII[self.size]
        across, down = zip(*OUTLINES.get(self.shape, [(-1, -1), (1, 1)]), strict=True)
        return x + radius * min(across), y + radius * min(down), x + radius * max(across), y + radius * max(down)

    @property
    def phrase(self) -> str:
        """For instance `at b3 a large red circle`."""
        return f"at {self.cell} a {self.size} {self.colour} {self.shape}"

    @property
    def phrase_place_last(self) -> str:
        """The other form, of as many tokens: `a large red circle at b3`."""
        return f"a {self.size} {self.colour} {self.shape} at {self.cell}"


@dataclass(frozen=True)
class Word:
    """Four letters, one in each cell of a row."""

    row: int
    colour: str
    text: str


@dataclass(frozen=True)
class Scene:
    """The content of a picture: things in reading order, and at most one word."""

    things: tuple[Thing, ...]
    word: Word | None

    @property
    def held_out(self) -> bool:
        """Whether no training may see it."""
        return zlib.crc32(repr(self).encode()) % HELD_OUT_SHARE == 0

    def caption(self, rng: random.Random | None = None) -> str:
        """All that is in the picture; `rng` draws the form of each thing's phrase, which is else one and the same."""
        phrases = [thing.phrase_place_last if rng and rng.random() < 0.5 else thing.phrase for thing in self.things]
        shapes = f"There are {NUMBERS[len(self.things)]} shapes: {listing(phrases)}."
        if self.word is None:
            return shapes
        return f"{shapes} The word {self.word.text} is written in row {self.word.row + 1}, in {self.word.colour}."

    def questions(self) -> list[list[tuple[str, str]]]:
        """Questions about the picture with their answers, by kind: the word, the cells, the rows."""
        cells, rows = [], []
        for thing in self.things:
            told = f"The cell {thing.cell} of the picture holds a {thing.size} {thing.colour} {thing.shape}"
            cells.append((f"What is at {thing.cell}?", f"{told}, and nothing else is to be seen in it."))
        for row in sorted({thing.row for thing in self.things}):
            found = listing([thing.phrase for thing in self.things if thing.row == row])
            told = f"In row {row + 1} of the picture one sees, from left to right: {found}."
            rows.append((f"What is in row {row + 1}?", told))
        return [[("Which word is written?", self.word_answer())], cells, rows]

    def word_answer(self) -> str:
        """The answer to the question about the word: its text, place and colour."""
        if self.word is None:
            return f"No word is written in the picture: all that it shows is {NUMBERS[len(self.things)]} shapes."
        start = f"The word {self.word.text} is written in row {self.word.row + 1} of the picture"
        return f"{start}, in {self.word.colour} letters."

    def draw(self) -> Image.Image:
        """The picture, 256 x 256 pixels."""
        image = Image.new("RGB", (GRID * CELL, GRID * CELL), "white")
        canvas = ImageDraw.Draw(image)
        for thing in self.things:
            centre = ((thing.column + 0.5) * CELL, (thing.row + 0.5) * CELL)
            draw_shape(canvas, thing.shape, centre, RADII[thing.size], COLOURS[thing.colour])
        if self.word is not None:
            font = ImageFont.load_default(size=54)
            for column, letter in enumerate(self.word.text):
                centre = ((column + 0.5) * CELL, (self.word.row + 0.5) * CELL)
                canvas.text(centre, letter, fill=COLOURS[self.word.colour], font=font, anchor="mm")
        return image


def listing(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def draw_shape(canvas: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: int, colour: str) -> None:
    """Fill one shape around `centre`."""
    x, y = centre
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    canvas.polygon([(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[shape]], fill=colour)


def any_scene(rng: random.Random) -> Scene:
    """A random scene of either split: three to five shapes, four or five where there is no word."""
    word = None
    if rng.random() < 0.5:
        word = Word(rng.randrange(GRID), rng.choice(list(COLOURS)), rng.choice(WORDS))
    free = [(r, c) for r in range(GRID) for c in range(GRID) if word is None or r != word.row]
    places = sorted(rng.sample(free, rng.randint(4 if word is None else 3, 5)))
    things = [Thing(*p, rng.choice(list(RADII)), rng.choice(list(COLOURS)), rng.choice(SHAPES)) for p in places]
    return Scene(tuple(things), word)


def scene(held_out: bool, seed: int, index: int) -> Scene:
    """Scene number `index` of a split."""
    rng = random.Random(f"{held_out}-{seed}-{index}")
    while (found := any_scene(rng)).held_out != held_out:
        pass
    return found


def conversations(held_out: bool, seed: int, num_scenes: int) -> list[tuple[Scene, str, str]]:
    """(scene, question, answer) of two conversations a scene: its caption, and one of its questions."""
    pairs = []
    for index in range(num_scenes):
        shown = scene(held_out, seed, index)
        pairs.append((shown, "Describe the picture.", shown.caption()))
        # A kind first, then one of its questions: there are more cells than rows, and only one word.
        rng = random.Random(f"question-{seed}-{index}")
        kinds = shown.questions()
        question, told = rng.choice(rng.choice(kinds))
        pairs.append((shown, question, told))
    return pairs


def free_captions(held_out: bool, seed: int, num_scenes: int) -> list[tuple[Scene, str, str]]:
    """(scene, question, answer): captions whose phrases have either form, drawn at random.

    No picture tells which form comes, so tokens that are decided together must agree on one.
    """
    shown = [(index, scene(held_out, seed, index)) for index in range(num_scenes)]
    return [
        (each, "Describe the picture.", each.caption(random.Random(f"form-{held_out}-{seed}-{index}")))
        for index, each in shown
    ]


TEXTS: dict[str, Callable[[bool, int, int], list[tuple[Scene, str, str]]]] = {
    "fixed": conversations,
    "free": free_captions,
}

_PLACE = f"at ([{COLUMNS}][1-{GRID}])"
_THING = f"a ({'|'.join(RADII)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PHRASE = re.compile(rf"\b(?:{_PLACE} {_THING}|{_THING} {_PLACE})\b")
_WORD = re.compile(rf" The word ({'|'.join(WORDS)}) is written in row ([1-{GRID}]), in ({'|'.join(COLOURS)})\.")


def phrase_spans(caption: str) -> list[tuple[int, int]]:
    """[start, end) of every thing's phrase, in characters."""
    return [found.span() for found in _PHRASE.finditer(caption)]


def facts(caption: str) -> set[Fact]:
    """What a caption says of its picture, wherever it can be read."""
    things = [(place or last, *filter(None, rest)) for place, *rest, last in _PHRASE.findall(caption)]
    return {*things, *((row, colour, text) for text, row, colour in _WORD.findall(caption))}


def is_valid(caption: str) -> bool:
    """Whether a caption is one in all its words, in either form: true of its picture or not."""
    shapes, words = _WORD.subn("", caption)
    count = len(_PHRASE.findall(shapes))
    if not 0 < count < len(NUMBERS) or words > 1 or not caption.startswith(shapes):
        return False
    return _PHRASE.sub("a thing", shapes) == f"There are {NUMBERS[count]} shapes: {listing(['a thing'] * count)}."


def facts_f1(caption: str, expected: str) -> float:
    """F1 of the facts of two captions, 0 to 1."""
    said, true = facts(caption), facts(expected)
    return 2 * len(said & true) / max(len(said) + len(true), 1)
