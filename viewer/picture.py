"""A recording as a picture, shaded by the step that decided each token, and as an animation of its steps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..app.boxes import draw_things
from ..app.terminal import counted
from .recording import Recording

WIDTH, MARGIN, IMAGE_WIDTH = 1000, 28, 300  # in points; `scale` pixels each
TEXT_SIZE, SMALL_SIZE, LINE = 19, 11, 41
PAPER, INK, SOFT, RULE, OPEN, RING, REVISED = (
    "#ffffff",
    "#1d1b18",
    "#6b665e",
    "#dedad2",
    "#f0ede8",
    "#1c5fc4",
    "#a3207c",
)
EARLY, LATE = (226, 238, 252), (112, 166, 232)  # shades of the first and the last step
EXACT, NEAR = (PAPER, INK, OPEN, RING), 10  # colours that a palette keeps, and how far off their neighbours are
# Tried in this order where the built-in font, which is Latin, lacks a character.
FALLBACK_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "PingFang.ttc", "msyh.ttc")
STEP_TIME, END_TIME = 400, 3000  # milliseconds
MOST_FRAMES = 200  # of an animation, which is as high as the whole response


def write_png(recording: Recording, path: str | Path, font: str | None = None) -> None:
    """Write the finished response: shaded by step within the block, the step's number under each token.

    Args:
        recording: what to show.
        path: of the file.
        font: TrueType file; by default Pillow's own, or for other scripts one of the system's.
    """
    Drawing(recording, 2, font).draw(len(recording.steps)).save(path, "PNG", optimize=True)


def write_gif(recording: Recording, path: str | Path, font: str | None = None) -> None:
    """Write an animation of all steps, one frame each, that stops at the end for a while and begins again.

    Of a response of more than `MOST_FRAMES` steps it shows every second one, or fewer.
    """
    drawing, last = Drawing(recording, 1, font), len(recording.steps)
    counts = [*range(0, last, -(-last // MOST_FRAMES)), last]
    palette = shared_palette([drawing.draw(count) for count in [*counts[:: max(len(counts) // 4, 1)], last]])
    frames = [drawing.draw(count).quantize(palette=palette, dither=Image.Dither.NONE) for count in counts]
    durations = [STEP_TIME] * (len(frames) - 1) + [END_TIME]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def shared_palette(frames: list[Image.Image]) -> Image.Image:
    """256 colours for all frames; paper, ink and rings are exactly as drawn."""
    width, height = frames[0].size
    stacked = Image.new("RGB", (width, height * len(frames)))
    for number, frame in enumerate(frames):
        stacked.paste(frame, (0, number * height))
    palette = stacked.quantize(256)
    colours = palette.getpalette() or []
    for exact in map(ImageColor.getrgb, EXACT):
        distances = [math.dist(exact, colours[start : start + 3]) for start in range(0, len(colours), 3)]
        for entry, distance in enumerate(distances):
            if distance <= max(NEAR, min(distances)):  # Pillow looks colours up in steps, and would take a neighbour
                colours[3 * entry : 3 * entry + 3] = exact
    palette.putpalette(colours)
    return palette


@dataclass(frozen=True)
class Place:
    """The box of a position of the response: left, top and width, in points."""

    x: float
    y: float
    width: float


class Drawing:
    """A layout that all states of a recording share, so that nothing moves while tokens are decided.

    Args:
        recording: what to show.
        scale: pixels per point.
        font: see `write_png`.
    """

    def __init__(self, recording: Recording, scale: int, font: str | None = None):
        self.recording, self.scale = recording, scale
        texts = [recording.title, recording.prompt, *(text or "" for step in recording.steps for text in step.texts)]
        self.fonts = {size: load_font("".join(texts), size * scale, font) for size in (TEXT_SIZE, SMALL_SIZE, 16)}
        self.left = MARGIN + (IMAGE_WIDTH + MARGIN if recording.images else 0)
        self.images = [fitted(image, IMAGE_WIDTH * scale) for image in recording.images]
        placed = [draw_things(image, recording.things) for image in recording.images[:1]]
        self.placed = [*(fitted(image, IMAGE_WIDTH * scale) for image in placed), *self.images[1:]]
        self.top = MARGIN + (62 if recording.prompt else 38)
        self.places = list(self.lay_out())
        under_text = max((place.y + LINE for place in self.places), default=self.top)
        under_images = self.top + sum(image.height / scale + 12 for image in self.images)
        self.height = int(max(under_text, under_images)) + MARGIN + 18
        self.last_numbers = max(
            (n for i in recording.last_steps().values() for _, n, _ in recording.decided(i)), default=1
        )

    def lay_out(self) -> Iterator[Place]:
        """Places of all positions: words stay whole, and each token has room for all that it ever is."""
        size = self.recording.block_size
        widths: dict[int, float] = {}
        for step in self.recording.steps:
            for offset, text in enumerate(step.texts):
                position = step.block * size + offset
                widths[position] = max(widths.get(position, 4), self.measure(visible(text)) + 3)
        final = self.final_texts()
        right, x, y = WIDTH - MARGIN, float(self.left), float(self.top)
        for word in words(final):
            if x > self.left and x + sum(widths[position] for position in word) > right:
                x, y = self.left, y + LINE
            for position in word:
                if position >= self.recording.num_tokens:  # cut behind the end of the response
                    return
                if x > self.left and x + widths[position] > right:
                    x, y = self.left, y + LINE
                yield Place(x, y, widths[position])
                x += widths[position]
                if "\n" in final[position]:
                    x, y = self.left, y + LINE

    def final_texts(self) -> list[str]:
        """The final text of each position."""
        return [
            text or "" for index in self.recording.last_steps().values() for text in self.recording.steps[index].texts
        ]

    def draw(self, count: int) -> Image.Image:
        """The state after `count` steps."""
        scale = self.scale
        canvas = Image.new("RGB", (WIDTH * scale, self.height * scale), PAPER)
        pen = ImageDraw.Draw(canvas)
        self.draw_head(pen, count)
        top = self.top
        ended = count == len(self.recording.steps)
        for image in self.placed if ended else self.images:
            canvas.paste(image, (MARGIN * scale, top * scale))
            corner = (MARGIN * scale + image.width - 1, top * scale + image.height - 1)
            pen.rectangle((MARGIN * scale, top * scale, *corner), outline=RULE, width=scale)
            top += image.height // scale + 12
        for index in {step.block: i for i, step in enumerate(self.recording.steps[:count])}.values():
            self.draw_block(pen, index, is_last=index == count - 1 < len(self.recording.steps) - 1)
        if count < len(self.recording.steps):
            self.draw_coming(pen, count)
        self.draw_legend(pen)
        return canvas

    def draw_head(self, pen: Any, count: int) -> None:
        """Title, prompt, and the counts so far."""
        recording = self.recording
        self.write(pen, (MARGIN, MARGIN - 6), recording.title, 16, INK)
        if recording.prompt:
            self.write(pen, (MARGIN, MARGIN + 19), shortened(recording.prompt), 16, SOFT)
        last = {step.block: index for index, step in enumerate(recording.steps[:count])}.values()
        held = [position for index in last for position, number, _ in recording.decided(index) if number]
        tokens = sum(position < recording.num_tokens for position in held)
        text = f"{counted(tokens, 'token')} · {counted(count, 'step')}"
        if count == len(recording.steps):
            text = f"{counted(recording.num_tokens, 'token')} · {counted(recording.num_forwards, 'forward')} · "
            text += f"{recording.tokens_per_forward:.2f} tokens per forward"
        self.write(pen, (WIDTH - MARGIN - self.measure(text, 16), MARGIN - 6), text, 16, INK)

    def draw_block(self, pen: Any, index: int, is_last: bool) -> None:
        """The tokens of a block after step `index`, of which the step's own are ringed if it is the last so far."""
        recording, step = self.recording, self.recording.steps[index]
        new = {*step.committed, *step.revised} if is_last else set()
        first = next(number for number, other in enumerate(recording.steps) if other.block == step.block)
        revised = {place for other in recording.steps[first : index + 1] for place in other.revised}
        for offset, (position, number, _) in enumerate(
            recording.decided(index)[: len(self.places) - step.block * recording.block_size]
        ):
            fill = mixed(EARLY, LATE, number, self.last_numbers) if number else OPEN
            is_dictated = number and position in recording.dictated
            outline = RING if offset in new else SOFT if is_dictated else None
            self.box(pen, position, PAPER if is_dictated else fill, outline)
            if number:
                place, label = self.places[position], str(number)
                self.write(pen, (place.x + 1.5, place.y + 2), visible(step.texts[offset]), TEXT_SIZE, INK)
                middle = place.x + (place.width - self.measure(label, SMALL_SIZE)) / 2
                self.write(pen, (middle, place.y + 26), label, SMALL_SIZE, REVISED if offset in revised else SOFT)

    def draw_coming(self, pen: Any, count: int) -> None:
        """The block that the next step works on, if it is a new one."""
        block = self.recording.steps[count].block
        if count == 0 or self.recording.steps[count - 1].block != block:
            size = self.recording.block_size
            for position in range(block * size, min((block + 1) * size, len(self.places))):
                self.box(pen, position, OPEN, None)

    def draw_legend(self, pen: Any) -> None:
        """Draw the legend: a shade for each step."""
        y, x = self.height - MARGIN - 2, float(self.left)
        self.write(pen, (x, y), "step", SMALL_SIZE, SOFT)
        x += self.measure("step", SMALL_SIZE) + 8
        shades = min(self.last_numbers, 8)
        for shade in range(shades):
            number = 1 + round(shade * (self.last_numbers - 1) / max(shades - 1, 1))
            colour = mixed(EARLY, LATE, number, self.last_numbers)
            self.rectangle(pen, (x, y - 2, x + 24, y + 15), colour, None)
            label = str(number)
            self.write(pen, (x + 12 - self.measure(label, SMALL_SIZE) / 2, y), label, SMALL_SIZE, INK)
            x += 26
        if self.recording.dictated:
            self.rectangle(pen, (x + 8, y - 2, x + 32, y + 15), PAPER, SOFT)
            self.write(pen, (x + 38, y), "dictated by the form", SMALL_SIZE, SOFT)
            x += 46 + self.measure("dictated by the form", SMALL_SIZE)
        if any(step.revised for step in self.recording.steps):
            self.write(pen, (x + 10, y), "number in this colour: revised", SMALL_SIZE, REVISED)

    def box(self, pen: Any, position: int, fill: Any, outline: str | None) -> None:
        """The background of a token."""
        place = self.places[position]
        self.rectangle(pen, (place.x + 0.5, place.y, place.x + place.width - 0.5, place.y + 25), fill, outline)

    def rectangle(self, pen: Any, box: tuple[float, float, float, float], fill: Any, outline: str | None) -> None:
        """A rounded rectangle, in points."""
        corners = [round(value * self.scale) for value in box]
        pen.rounded_rectangle(corners, 4 * self.scale, fill=fill, outline=outline, width=2 * self.scale)

    def write(self, pen: Any, at: tuple[float, float], text: str, size: int, colour: str) -> None:
        """Text with its upper left corner `at` a point."""
        pen.text((at[0] * self.scale, at[1] * self.scale), text, font=self.fonts[size], fill=colour)

    def measure(self, text: str, size: int = TEXT_SIZE) -> float:
        """Width of a text, in points."""
        return self.fonts[size].getlength(text) / self.scale


def words(texts: list[str]) -> Iterator[list[int]]:
    """Positions in groups that a line break should not part: one that begins with a space begins a group."""
    group: list[int] = []
    for position, text in enumerate(texts):
        if group and (not text or text[0].isspace() or text.startswith("<|") or texts[position - 1][-1:].isspace()):
            yield group
            group = []
        group.append(position)
    if group:
        yield group


def visible(text: str | None) -> str:
    """A token's text in one line."""
    return (text or "").replace("\n", " ").replace("\t", "  ")


def shortened(text: str, length: int = 100) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def mixed(early: tuple[int, int, int], late: tuple[int, int, int], number: int, last: int) -> tuple[int, ...]:
    """The shade of step `number` of `last`."""
    share = (number - 1) / max(last - 1, 1)
    return tuple(round(a + (b - a) * share) for a, b in zip(early, late, strict=True))


def fitted(image: Image.Image, width: int) -> Image.Image:
    """The image at a width, at most one and a half times as high."""
    image = image.convert("RGB")
    size = min(width / image.width, 1.5 * width / image.height)
    return image.resize(
        (max(round(image.width * size), 1), max(round(image.height * size), 1)), Image.Resampling.LANCZOS
    )


def load_font(text: str, size: int, path: str | None = None) -> Any:
    """The font of a file, or the first that has every character of `text`, or Pillow's own."""
    if path is not None:
        return ImageFont.truetype(path, size)
    own = ImageFont.load_default(size)
    if has_all(own, text):
        return own
    for name in FALLBACK_FONTS:
        try:
            found = ImageFont.truetype(name, size)
        except OSError:
            continue
        if has_all(found, text):
            return found
    return own


def has_all(font: Any, text: str) -> bool:
    """Whether a font draws no character of `text` as the box that stands for a missing one."""
    missing = bytes(font.getmask("\U0010fffd"))
    return all(bytes(font.getmask(character)) != missing for character in set(text) if not character.isspace())
