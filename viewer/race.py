"""Two decoders of one picture as an animation: both start together, and a clock counts forwards."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..app.terminal import counted
from .picture import INK, MARGIN, OPEN, PAPER, RING, RULE, SOFT, fitted, load_font, shared_palette, visible, words
from .recording import RecordedStep, Recording

WIDTH, PICTURE, SIZE, SMALL, LINE = 960, 150, 16, 14, 28  # pixels
DONE = "#dcebdf"
Box = tuple[float, float, float]  # left, top and width of a token
LENGTH, PAUSE = 4000, 1000  # milliseconds of the race, and of its end


def token_by_token(texts: list[str], title: str) -> Recording:
    """The recording of a decoder that writes one token per forward."""
    steps = [RecordedStep(place, [text], [0], [], [1.0]) for place, text in enumerate(texts)]
    return Recording(steps, 1, len(texts), len(texts), 1.0, "".join(texts), title)


def write_race(left: Recording, right: Recording, path: str | Path, font: str | None = None) -> None:
    """Write an animation (GIF) of two recordings side by side, a frame per forward; it takes at most 5 seconds.

    The picture and the prompt are those of `right`; each side is headed by its title.
    """
    race = Race(left, right, font)
    last = max(len(left.steps), len(right.steps))
    frames = [race.draw(count) for count in range(last + 1)]
    palette = shared_palette([frames[0], frames[len(frames) // 2], frames[-1]])
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [max(LENGTH // len(frames) // 10 * 10, 20)] * last + [PAUSE]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


class Race:
    """The layout of both sides; nothing moves while tokens are decided."""

    def __init__(self, left: Recording, right: Recording, font: str | None = None):
        self.right = right
        texts = [text or "" for side in (left, right) for step in side.steps for text in step.texts]
        everything = "".join([left.title, right.title, right.prompt, *texts])
        self.fonts = {size: load_font(everything, size, font) for size in (SIZE, SMALL)}
        self.picture = fitted(right.images[0], PICTURE) if right.images else None
        self.top = MARGIN + (self.picture.height if self.picture else 30) + 16
        column = (WIDTH - 3 * MARGIN) // 2
        self.sides = [
            (side, x, self.lay_out(side, x, x + column)) for side, x in ((left, MARGIN), (right, 2 * MARGIN + column))
        ]
        bottoms = [y for _, _, places in self.sides for _, y, _ in places]
        self.height = round(max(bottoms, default=self.top)) + LINE + MARGIN

    def lay_out(self, side: Recording, left: int, right: int) -> list[Box]:
        """Left, top and width of every token of the response."""
        final = [text or "" for index in side.last_steps().values() for text in side.steps[index].texts]
        places: list[Box] = []
        x, y = float(left), float(self.top + 2 * LINE)
        for word in words(final):
            widths = [self.measure(visible(final[position])) + 5 for position in word]
            if x > left and x + sum(widths) > right:
                x, y = float(left), y + LINE
            for width in widths:
                places.append((x, y, width))
                x += width
        return places[: side.num_tokens]

    def measure(self, text: str, size: int = SIZE) -> float:
        """Width of a text in pixels."""
        return self.fonts[size].getlength(text)

    def draw(self, count: int) -> Image.Image:
        """The state after `count` forwards of both."""
        canvas = Image.new("RGB", (WIDTH, self.height), PAPER)
        pen = ImageDraw.Draw(canvas)
        beside = MARGIN
        if self.picture:
            canvas.paste(self.picture, (MARGIN, MARGIN))
            beside += self.picture.width + 20
        pen.text((beside, MARGIN), self.right.prompt, font=self.fonts[SIZE], fill=INK)
        pen.text((beside, MARGIN + LINE), f"clock: {counted(count, 'forward')}", font=self.fonts[SIZE], fill=RING)
        for side, x, places in self.sides:
            self.draw_side(pen, side, x, places, count)
        return canvas

    def draw_side(self, pen: Any, side: Recording, x: int, places: list[Box], count: int) -> None:
        """One side: its title, what it has written, and the boxes that it is writing into."""
        taken = min(count, len(side.steps))
        ended = taken == len(side.steps)
        pen.line((x, self.top - 8, x + (WIDTH - 3 * MARGIN) // 2, self.top - 8), fill=RULE)
        pen.text((x, self.top), side.title, font=self.fonts[SIZE], fill=INK)
        told = f"done after {counted(side.num_forwards, 'forward')}" if ended else "writing"
        pen.text((x, self.top + LINE - 6), told, font=self.fonts[SMALL], fill=RING if ended else SOFT)
        size = side.block_size
        for step in (
            side.steps[index] for index in {each.block: i for i, each in enumerate(side.steps[:taken])}.values()
        ):
            for offset, text in enumerate(step.texts):
                position = step.block * size + offset
                self.draw_token(pen, places, position, text, position in side.dictated)
        if not ended and (taken == 0 or side.steps[taken].block != side.steps[taken - 1].block):
            for offset in range(size):
                self.draw_token(pen, places, side.steps[taken].block * size + offset, None)

    def draw_token(
        self, pen: Any, places: list[Box], position: int, text: str | None, is_dictated: bool = False
    ) -> None:
        """A token in its box, a frame where a form dictated it; an open box for None; nothing behind the end."""
        if position >= len(places):
            return
        x, y, width = places[position]
        box = (x, y, x + width - 1, y + LINE - 6)
        if text is not None and is_dictated:
            pen.rounded_rectangle(box, 3, fill=PAPER, outline=SOFT)
        else:
            pen.rounded_rectangle(box, 3, fill=OPEN if text is None else DONE)
        if text is not None:
            pen.text((x + 2, y + 2), visible(text), font=self.fonts[SIZE], fill=INK)
