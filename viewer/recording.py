"""A generation as something to show: what every block read like after every step, and how sure the model was."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..app.boxes import Thing, find_things


@dataclass(frozen=True)
class RecordedStep:
    """One denoising step. Lists are as long as a block.

    Attributes:
        block: index of the block in the response.
        texts: of each token in its context; None where undecided, "" for all but the last token of a character that
            takes several.
        committed, revised: positions that this step decided, or changed.
        confidence: probability of the token that each position would have taken at this step.
        guesses: that token's text where undecided, "" elsewhere; empty if it is not known.
    """

    block: int
    texts: list[str | None]
    committed: list[int]
    revised: list[int]
    confidence: list[float]
    guesses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recording:
    """The steps of one response, and what is shown beside them.

    Attributes:
        steps: in order.
        block_size: tokens of a block.
        num_tokens: response tokens, up to and including EOS; later ones of the last block were cut.
        num_forwards: that the response took part in, and `tokens_per_forward`.
        text: the response without special tokens.
        title, prompt, images: shown beside it.
        dictated: positions of the response to which a form left no alternative.
        things: that the response places in the first picture, by boxes or points in its pixels.
    """

    steps: list[RecordedStep]
    block_size: int
    num_tokens: int
    num_forwards: int
    tokens_per_forward: float
    text: str
    title: str = "Bard-VL"
    prompt: str = ""
    images: list[Image.Image] = field(default_factory=list)
    dictated: frozenset[int] = frozenset()
    things: list[Thing] = field(default_factory=list)

    @classmethod
    def of(cls, output: Any, processor: Any, row: int = 0, mask_token_id: int | None = None, **beside: Any) -> Any:
        """The recording of a row of what `generate(..., output_history=True, return_dict_in_generate=True)` returned.

        Args:
            output: the `BardVLGenerationOutput`.
            processor: the checkpoint's.
            row: of the output.
            mask_token_id: if not the processor's.
            beside: `title`, `prompt`, `images`.

        Raises:
            ValueError: the output has no history.
        """
        if getattr(output, "history", None) is None:
            raise ValueError("no history: call `generate` with output_history=True and return_dict_in_generate=True")
        mask = processor.mask_token_id if mask_token_id is None else mask_token_id
        num_tokens, longest = int(output.num_tokens[row]), output.confidences.shape[1]
        ids = output.sequences[row, output.sequences.shape[1] - longest :][:num_tokens].tolist()
        tokens_per_forward = float(output.tokens_per_forward[row])
        steps = [
            RecordedStep(
                block=step.block,
                texts=spell(step.ids.tolist(), mask, lambda run: processor.tokenizer.decode(run)),
                committed=step.committed.nonzero()[:, 0].tolist(),
                revised=step.revised.nonzero()[:, 0].tolist(),
                confidence=[round(value, 4) for value in step.confidence.tolist()],
                guesses=guesses(step, mask, processor.tokenizer.decode),
            )
            for step in output.history[row]
        ]
        text = processor.decode(ids, skip_special_tokens=True)
        dictated, images = getattr(output, "dictated", None), beside.get("images")
        return cls(
            steps=steps,
            block_size=len(output.history[row][0].ids),
            num_tokens=num_tokens,
            num_forwards=round(num_tokens / tokens_per_forward),
            tokens_per_forward=tokens_per_forward,
            text=text,
            dictated=frozenset() if dictated is None else frozenset(dictated[row].nonzero()[:, 0].tolist()),
            things=find_things(text, *images[0].size) if images else [],
            **beside,
        )

    def _repr_html_(self) -> str:
        """The player, as notebooks show it."""
        from .page import frame_of

        return frame_of(self)

    def last_steps(self) -> dict[int, int]:
        """Index of each block's last step so far, by block, in the order of the blocks."""
        return {step.block: index for index, step in enumerate(self.steps)}

    def decided(self, index: int) -> list[tuple[int, int, float]]:
        """Of each position of the block of step `index`: in which of its steps it got what it holds, and how surely.

        Steps count from 1 within the block; 0 is undecided, with the confidence of what would be taken.
        """
        step = self.steps[index]
        first = next(number for number, other in enumerate(self.steps) if other.block == step.block)
        found = [(0, value) for value in step.confidence]
        for number, other in enumerate(self.steps[first : index + 1], start=1):
            for place in (*other.committed, *other.revised):
                found[place] = (number, other.confidence[place])
        return [
            (step.block * self.block_size + place, *((0, step.confidence[place]) if text is None else found[place]))
            for place, text in enumerate(step.texts)
        ]


def guesses(step: Any, mask_token_id: int, decode: Callable[[list[int]], str]) -> list[str]:
    """The tokens that undecided positions of a step of a history would have taken, as texts."""
    undecided = (step.ids == mask_token_id).tolist()
    texts = (decode([chosen]) for chosen in step.chosen.tolist())
    return [text if is_open and "\ufffd" not in text else "" for text, is_open in zip(texts, undecided, strict=True)]


def spell(ids: list[int], mask_token_id: int, decode: Callable[[list[int]], str]) -> list[str | None]:
    """Text of every id among its neighbours, None for masks; see `RecordedStep.texts`."""
    texts: list[str | None] = []
    run: list[int] = []
    shown = ""
    for token_id in ids:
        if token_id == mask_token_id:
            texts.append(None)
            run, shown = [], ""
            continue
        run.append(token_id)
        text = decode(run)
        if text.endswith("\ufffd"):  # the first bytes of a character
            texts.append("")
        else:
            texts.append(text[len(shown) :])
            shown = text
    return texts
