"""One chat -> one sample: messages, pictures and videos as ids, positions and turns, as inference would see them.

Every assistant turn is trained, so the tokens before each of them must be those that inference gets as the prompt of
that turn. The rendered chat is cut at both ends of every turn and tokenised piece by piece; where that differs from
tokenising a prompt as a whole, the chat is left out. Nothing here knows where chats come from; see data.py.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from jinja2 import TemplateError

from ..inputs_bard_vl import MEDIA_KINDS, VISUAL_INPUTS, grids_of
from ..media_bard_vl import Media, describe
from ..modeling_bard_vl import BardVLModel
from ..processing_bard_vl import stated_size
from .messages import BrokenChat, decode_image, is_trained, open_image, open_video, read_messages
from .packing import Sample, packed_length, truncate
from .places import Places, places_in


@dataclass(frozen=True)
class Broken:
    """The place of a skipped chat in a batch.

    Attributes:
        sample_id: the chat's row in its data set, None in a stream.
        reason: why, in the few words that skipped chats are counted by.
        detail: what is wrong with it.
    """

    sample_id: int | None
    reason: str
    detail: str


@dataclass(frozen=True)
class ChatLimits:
    """The limits on the chats that are used.

    Attributes:
        block_size: tokens per block of the packed rows.
        max_length: columns of a packed row, which a chat must fit in with the copies of its turns.
        overlong: what happens to a chat that does not fit: "drop" it, or "truncate" its last turns.
        max_total_length: tokens of the chat itself; longer ones are left out.
        min_short_side: pixels; chats with a picture of a shorter side are left out.
        max_aspect_ratio: chats with a picture of a longer side over shorter side above it are left out.
        noisy_copies: of each response in a packed row.
        coordinates: "relative" leaves out chats whose boxes or points are not from 0 to 1000, "any" none.
    """

    block_size: int
    max_length: int
    overlong: Literal["drop", "truncate"] = "drop"
    max_total_length: int | None = None
    min_short_side: int | None = None
    max_aspect_ratio: float | None = None
    noisy_copies: int = 1
    coordinates: Literal["relative", "any"] = "relative"

    def __post_init__(self) -> None:
        """Raise `ValueError` for a limit that no chat could meet."""
        for name, known in (("overlong", ("drop", "truncate")), ("coordinates", ("relative", "any"))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}")
        for name in ("block_size", "max_length", "max_total_length", "min_short_side", "max_aspect_ratio"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")

    def check(self, measured: "Measured") -> None:
        """Raise `BrokenChat` unless a chat is to be used."""
        short, ratio, length = measured.short_side, measured.aspect_ratio, measured.length
        if self.min_short_side is not None and short is not None and short < self.min_short_side:
            raise BrokenChat("picture too small", f"its shorter side has {short} pixels, below {self.min_short_side}")
        if self.max_aspect_ratio is not None and ratio is not None and ratio > self.max_aspect_ratio:
            raise BrokenChat("picture too long", f"an aspect ratio of {ratio:.4g}, above {self.max_aspect_ratio}")
        if self.coordinates == "relative" and measured.places.fault is not None:
            raise BrokenChat("coordinates", measured.places.fault)
        if self.max_total_length is not None and length > self.max_total_length:
            raise BrokenChat("too many tokens", f"{length}, above `max_total_length` {self.max_total_length}")
        columns = self.columns(measured)
        first = measured.responses[:1]
        if self.overlong == "truncate":  # what is left in the end: one block of the first response
            first = [(first[0][0], min(first[0][1], first[0][0] + self.block_size))]
            columns = packed_length(first, length, self.block_size, self.noisy_copies)
        if columns > self.max_length:
            what = "its first block alone takes" if self.overlong == "truncate" else "it takes"
            raise BrokenChat("too long for a row", f"{what} {columns} columns, above `max_length` {self.max_length}")

    def columns(self, measured: "Measured") -> int:
        """Columns that a chat takes in a packed row, `max_length` at most if it is to be truncated."""
        columns = packed_length(measured.responses, measured.length, self.block_size, self.noisy_copies)
        return min(columns, self.max_length) if self.overlong == "truncate" else columns


@dataclass(frozen=True)
class Measured:
    """Facts about a chat before its pixels are decoded.

    Attributes:
        length: tokens up to the end of its last assistant turn.
        responses: [start, end) of every assistant turn.
        short_side: pixels of the shortest side of its pictures, None without pictures.
        aspect_ratio: largest longer side over shorter side of its pictures.
        places: the boxes and points of its answers.
    """

    length: int
    responses: list[tuple[int, int]]
    short_side: int | None = None
    aspect_ratio: float | None = None
    places: Places = field(default_factory=Places)


@dataclass
class Chat:
    """A chat as it was read: alternately what leads to an assistant turn and that turn, and the pictures in order."""

    pieces: list[str]
    images: list[Media] = field(default_factory=list)
    videos: list[Media] = field(default_factory=list)


class ChatEncoder:
    """Turns chats into samples; it can be pickled for data loader workers.

    A chat is a mapping with `messages`: a list of {"role", "content"}, the content a string or a list of text, image
    and video items in any form that `BardVLProcessor.apply_chat_template` takes; or it has another form that
    `messages_of` knows. Pictures are in their items, or in columns `images` and `videos`, which fill the items
    without one (and "<image>", "<video>" in string contents) in their order. A picture is a path, a URL, a data URI, a
    Pillow image, bytes, or the mapping of `datasets.Image`; a video a path, a URL or a list of frames. An assistant
    turn of `weight` 0 is no answer to learn. `tools`, if there, goes to the template.

    Two kinds of chats cannot be trained on exactly and are left out by name. Templates that render earlier
    turns differently once later ones exist (some drop the reasoning) leave no common prompt: reason "template".
    Tokenizers may merge the end of a prompt with the first characters of a response, here a line break: what inference
    sees of that turn in the prompt of a later one is then not what the turn was trained on: reason "merged tokens".

    Args:
        processor: `BardVLProcessor`, or `Qwen3VLProcessor`; its image processor sets the pixel limits.
        config: `BardVLConfig`.
        limits: which chats are used.
        media_folder: where relative paths start; the working directory by default.
    """

    def __init__(
        self, processor: Any, config: Any, limits: ChatLimits, media_folder: str | os.PathLike[str] | None = None
    ):
        self.processor, self.config, self.limits = processor, config, limits
        self.media_folder = Path(media_folder) if media_folder is not None else Path()
        self.tokenizer = processor.tokenizer
        self.eos_token = self.tokenizer.eos_token

    def encode(self, example: Mapping[str, Any], sample_id: int | None = None) -> Sample | Broken:
        """A sample, truncated if that is asked for, or why there is none; `sample_id` defaults to a hash of its ids."""
        try:
            chat = self.read(example)
            measured = self._measure(chat)
            self.limits.check(measured)
            whole = self._tokenize(chat)
        except BrokenChat as error:
            return Broken(sample_id, error.reason, error.detail)
        whole = replace(whole, sample_id=content_id(whole) if sample_id is None else sample_id)
        limits = self.limits
        sample = truncate(whole, limits.block_size, limits.max_length, limits.noisy_copies)
        assert sample is not None, "the limits leave at least one block"
        return sample

    def measure(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """The members of `Measured`, or `reason` and `detail`, as a row of a table; pixels are decoded for videos."""
        row: dict[str, Any] = dict.fromkeys(MEASURED_FEATURES)
        try:
            measured = self._measure(self.read(example))
        except BrokenChat as error:
            return {**row, "reason": error.reason, "detail": error.detail}
        starts, ends = zip(*measured.responses, strict=True)
        known = {"length": measured.length, "short_side": measured.short_side, "aspect_ratio": measured.aspect_ratio}
        return {**row, **known, **asdict(measured.places), "starts": starts, "ends": ends}

    def read(self, example: Mapping[str, Any]) -> Chat:
        """Render a chat and open its pictures, whose pixels are not decoded yet.

        Raises:
            BrokenChat: the messages are malformed, or a picture is missing or no picture.
        """
        messages, sources = read_messages(example)
        tools = {"tools": example["tools"]} if example.get("tools") else {}
        pieces = self.cut(messages, **tools)
        text = "".join(pieces)
        shown = {
            "image": text.count(self.processor.image_token),
            "video": text.count(self.processor.video_token),
        }
        for kind, given in sources.items():
            if shown[kind] != len(given):
                raise BrokenChat(f"{kind} count", f"the text shows {shown[kind]} {kind}s, {len(given)} are given")
        folder = self.media_folder
        images = [Media(open_image(image.source, folder), image.options) for image in sources["image"]]
        return Chat(pieces, images, [open_video(video, folder) for video in sources["video"]])

    def cut(self, messages: list[dict[str, Any]], **template: Any) -> list[str]:
        """Render messages, the last one an assistant's, as [prompt, response, prompt, response, ...].

        Each response ends with its end of sequence.

        Raises:
            BrokenChat: the pieces would not be what inference sees.
        """
        turns = [n for n, message in enumerate(messages) if is_trained(message["role"], message.get("weight"))]
        whole = self._render(messages, **template)
        pieces: list[str] = []
        done = 0
        for turn, number in enumerate(turns, start=1):
            if any(self.eos_token in item["text"] for item in messages[number]["content"]):
                raise BrokenChat("malformed messages", f"turn {turn} holds {self.eos_token} in its text")
            prompt = self._render(messages[:number], add_generation_prompt=True, **template)
            if not whole.startswith(prompt) or len(prompt) <= done:
                raise BrokenChat("template", f"it renders what leads to turn {turn} in another way once more follows")
            end = whole.find(self.eos_token, len(prompt)) + len(self.eos_token)
            if end < len(self.eos_token):
                raise BrokenChat("template", f"it does not end turn {turn} with {self.eos_token}")
            pieces += [prompt[done:], whole[len(prompt) : end]]
            done = end
        self._check_pieces(pieces)
        return pieces

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise BrokenChat("malformed messages", f"the chat template refuses them: {error}") from error

    def _check_pieces(self, pieces: list[str]) -> None:
        """Raise `BrokenChat` unless the pieces before the last turn have the ids that they have together."""
        if len(pieces) == 2:
            return
        ids = self._ids(["".join(pieces[:-1]), *pieces[:-1]])
        if ids[0] != list(chain(*ids[1:])):
            raise BrokenChat(
                "merged tokens", "a response before the last one begins in the token that its prompt ends in"
            )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _measure(self, chat: Chat) -> Measured:
        if chat.videos:
            sample = self._tokenize(chat)
            length, responses = len(sample.input_ids), sample.responses
        else:
            responses = self._responses(self._piece_lengths(chat))
            length = responses[-1][1]
        sides = [sorted(image.source.size) for image in chat.images]
        return Measured(
            length=length,
            responses=responses,
            short_side=min((short for short, _ in sides), default=None),
            aspect_ratio=max((long / short for short, long in sides), default=None),
            places=places_in(chat.pieces[1::2], chat.images[0].source.size if len(chat.images) == 1 else None),
        )

    def _piece_lengths(self, chat: Chat) -> list[int]:
        """Tokens of each piece, those of a picture by the rule that it will be resized by."""
        tokens = iter([self._tokens_of(image) for image in chat.images])
        is_image = self.processor.image_token_id
        return [sum(next(tokens) if id_ == is_image else 1 for id_ in ids) for ids in self._ids(chat.pieces)]

    def _tokens_of(self, image: Media) -> int:
        """Tokens of a picture, whose orientation does not matter: the rule gives both of them as many."""
        image_processor, (width, height) = self.processor.image_processor, image.source.size
        try:
            if image.sizes:
                width, height = stated_size((width, height), image.sizes, image_processor)
                return width * height // (image_processor.patch_size * image_processor.merge_size) ** 2
            return image_processor.get_number_of_image_patches(height, width, {}) // image_processor.merge_size**2
        except ValueError as error:
            raise BrokenChat("broken image", f"{describe(image)}: {error}") from error

    @staticmethod
    def _responses(piece_lengths: list[int]) -> list[tuple[int, int]]:
        edges = torch.tensor(piece_lengths).cumsum(0).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    def _tokenize(self, chat: Chat) -> Sample:
        """The sample, with pixels decoded."""
        decoded = [(decode_image(image.source), image.options) for image in chat.images]
        images = [Media(picture, options) if options else picture for picture, options in decoded]
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        try:
            inputs = self.processor(text=chat.pieces, images=images or None, videos=chat.videos or None, **options)
        except ImportError:
            raise
        except Exception as error:  # the decoders of videos have no common class
            if not (chat.videos or isinstance(error, ValueError)):
                raise
            raise BrokenChat("broken video" if chat.videos else "broken image", str(error)) from error
        lengths = inputs["attention_mask"].sum(-1).tolist()
        input_ids = inputs["input_ids"][inputs["attention_mask"].bool()]
        visual_inputs = {name: inputs[name] for name in VISUAL_INPUTS if name in inputs}
        positions = self._positions.get_position_ids(input_ids[None], **grids_of(visual_inputs))
        return Sample(
            input_ids=input_ids,
            position_ids=positions[1:, 0],
            responses=self._responses(lengths),
            visual_index=number_placeholders(self.config, input_ids),
            visual_inputs=visual_inputs,
            merge_size=self.config.vision_config.spatial_merge_size,
        )

    @cached_property
    def _positions(self) -> BardVLModel:
        """A trunk without layers or weights: the position code of every transformers line reads the config alone."""
        model = BardVLModel.__new__(BardVLModel)
        torch.nn.Module.__init__(model)
        model.config = self.config
        return model


MEASURED_FEATURES = {
    "length": datasets.Value("int64"),
    "starts": datasets.List(datasets.Value("int64")),
    "ends": datasets.List(datasets.Value("int64")),
    "short_side": datasets.Value("int64"),
    "aspect_ratio": datasets.Value("float64"),
    "fault": datasets.Value("string"),
    "num_places": datasets.Value("int64"),
    "num_beyond": datasets.Value("int64"),
    "log_chance": datasets.Value("float64"),
    "reason": datasets.Value("string"),
    "detail": datasets.Value("string"),
}


def content_id(sample: Sample) -> int:
    """A number that depends on the tokens and grids alone: the same in any order, shard and process."""
    tensors = [sample.input_ids, *(grid for name, grid in sample.visual_inputs.items() if name.endswith("grid_thw"))]
    digest = hashlib.blake2b(b"".join(tensor.numpy().tobytes() for tensor in tensors), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a non-negative int64


def number_placeholders(config: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The row of the features that each token of a conversation shows, in the order of the kinds; -1 for others."""
    index, first = torch.full_like(input_ids, -1), 0
    for kind in MEDIA_KINDS:
        shown = input_ids == kind.token_id(config)
        count = int(shown.sum())
        index[shown] = torch.arange(first, first + count)
        first += count
    return index
