"""Chats from files and data sets: read by `datasets`, measured, filtered, and packed into batches.

A mapped data set (`ChatSamples`) is measured once, without decoding pixels where that is possible, so that chats which
cannot be used are known, counted and reported before training. A stream is taken as it comes: `PackingCollator` encodes
its chats in the workers of the data loader and leaves out the broken ones.
"""

import copy
import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.fingerprint import Hasher
from pyarrow import ArrowException

from .. import __version__
from ..inputs_bard_vl import MEDIA_KINDS
from ..messages_bard_vl import ADDRESSES
from .chats import MEASURED_FEATURES, Broken, ChatEncoder, Measured
from .messages import FORMS, PLACEHOLDERS, BrokenChat
from .packing import PackedRows, Sample, pack
from .places import Places

logger = logging.getLogger(__name__)

FAULTS_OF_FILES = ("missing", "broken")  # how reasons begin that another try may find gone
NUM_NAMED = 5
PROBE_SIZE = 16
MEASURED_AT_ONCE = 10_000  # rows read together, which is much faster than one by one
FILE_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}


def open_chats(
    source: str | os.PathLike[str], split: str = "train", streaming: bool = False, name: str | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a data set of chats, its pictures not decoded.

    Args:
        source: a JSONL or parquet file, a folder of such files, what `save_to_disk` wrote, or a data set's name on the
            Hub.
        split: which split of a data set; files are one split.
        streaming: read it as it is needed.
        name: configuration of a data set on the Hub.

    Raises:
        ValueError: there is no such data set, its files cannot be read, or it has no column `messages`.
    """
    path = Path(source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        chats = datasets.load_from_disk(str(path))
        if isinstance(chats, datasets.DatasetDict):
            if split not in chats:
                raise ValueError(f"{path} has no split {split!r}, only {', '.join(chats)}")
            chats = chats[split]
        chats = chats.to_iterable_dataset() if streaming else chats
    elif path.exists():
        chats = open_files(path, streaming)
    elif path.suffix in FILE_FORMATS or path.is_absolute():
        raise ValueError(f"there is no file or folder {path}")
    else:
        chats = datasets.load_dataset(str(source), name, split=split, streaming=streaming)
    return without_decoding(check_columns(chats, str(source)))


def open_files(path: Path, streaming: bool) -> Any:
    """The rows of a file or of the files of a folder; `ValueError` if they cannot be read."""
    kind, files = data_files(path)
    patterns = {"train": [glob.escape(file) for file in files]}
    try:
        return datasets.load_dataset(kind, data_files=patterns, split="train", streaming=streaming)
    except StopIteration as error:
        raise ValueError(f"{path} is empty") from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def data_files(path: Path) -> tuple[str, list[str]]:
    """The builder of `datasets` for a file or a folder of files of one format, and the files in the order of names."""
    files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.suffix in FILE_FORMATS)
    formats = {FILE_FORMATS[file.suffix] for file in files}
    if len(formats) != 1:
        found = " and ".join(sorted(formats)) or "no"
        raise ValueError(
            f"{path} must hold files of one of the formats {', '.join(FILE_FORMATS)}; it has {found} files"
        )
    return formats.pop(), [str(file) for file in files]


def media_folder_of(source: str | os.PathLike[str]) -> Path | None:
    """The start of relative paths in the data of `source`: the folder of a file, the folder itself, else None."""
    path = Path(source)
    return path.parent if path.is_file() else path if path.is_dir() else None


def check_columns(chats: Any, source: str) -> Any:
    """The data set, unless it is known to have no column with chats; then `ValueError`."""
    if chats.column_names is not None and not {*FORMS} & {*chats.column_names}:
        raise ValueError(f"{source} has no column `messages`, only {', '.join(chats.column_names)}")
    return chats


def without_decoding(chats: Any) -> Any:
    """The data set with pictures as {"bytes", "path"}: sizes are read from headers, and broken ones can be skipped."""
    if chats.features is None:
        return chats
    features = datasets.Features(undecoded(chats.features))
    if isinstance(chats, datasets.IterableDataset):
        return chats.cast(features)
    chats = chats.with_format(None)  # a copy
    chats.info.features = features  # `cast` would write nested columns, bytes of pictures too, to the disk once more
    return chats


if hasattr(datasets, "Json"):  # from datasets 4.7 on

    @dataclass
    class Contents(datasets.Json):
        """Contents of messages, of which some are texts and some are lists.

        `datasets` stores both as JSON, and a text that is JSON itself, as `5` or `[{"bbox_2d": ...}]`, as it is. What
        is no content once it is read was such a text.
        """

        def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
            """A text or a list of items."""
            value = super().decode_example(example_data, token_per_repo_id)
            is_list = isinstance(value, list) and value and all(map(is_item, value))
            return value if is_list or isinstance(value, str) else example_data


def is_item(value: Any) -> bool:
    """Whether a value is an item of a content: a text, or a mapping that says what it is."""
    if not isinstance(value, Mapping):
        return isinstance(value, str)
    return not {"type", *PLACEHOLDERS, *ADDRESSES}.isdisjoint(value) or {*value} == {"text"}


def undecoded(feature: Any) -> Any:
    """A feature of `datasets`, or a tree of them, that leaves media as they are stored, and texts among contents."""
    if isinstance(feature, Mapping):
        is_json = {name: type(member).__name__ == "Json" for name, member in feature.items()}
        return {
            name: Contents() if name == "content" and is_json[name] else undecoded(member)
            for name, member in feature.items()
        }
    if isinstance(feature, list):
        return [undecoded(member) for member in feature]
    changed = copy.copy(feature)
    if hasattr(feature, "feature"):
        changed.feature = undecoded(feature.feature)
    elif isinstance(feature, (datasets.Image, datasets.Video)):
        changed.decode = False
    return changed


class SkippedChats:
    """Counts skipped chats by reason and names the first few of each in the log."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, broken: Iterable[Broken]) -> None:
        """Count, and log those among the first of their reason."""
        for each in broken:
            self.counts[each.reason] += 1
            if self.counts[each.reason] <= NUM_NAMED:
                where = "" if each.sample_id is None else f" {each.sample_id} (of 0, 1, ...)"
                logger.warning("skipped chat%s: %s (%s)", where, each.reason, each.detail)

    def __str__(self) -> str:
        """For instance "3 missing image, 1 no assistant turn"."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())


class ChatSamples(torch.utils.data.Dataset):
    """The usable chats of a mapped data set, as samples.

    Measuring shows a progress bar, runs in `num_proc` processes and is kept in the cache of `datasets` for data sets
    that are on the disk; pixel limits, tokenizer, template and data are its key, the files that paths name are not, but
    what was missing or broken is looked at again.
    Under several processes let the first one measure before the others.

    Attributes:
        indices: row in the data set of every usable chat; also its `sample_id`.
        lengths: columns that each takes in a packed row.
        skipped: what was left out, by reason.
        places: the boxes and points of the answers; a warning says so if they look like pixels.

    Args:
        chats: from `open_chats`, or any `datasets.Dataset` with a column `messages`.
        encoder: reads a chat; holds the limits.
        num_proc: processes that measure.

    Raises:
        ValueError: not one chat can be used.
    """

    def __init__(self, chats: datasets.Dataset, encoder: ChatEncoder, num_proc: int | None = None):
        self.chats, self.encoder = without_decoding(check_columns(chats, "the data set")), encoder
        self.indices: list[int] = []
        self.lengths: list[int] = []
        self.skipped = SkippedChats()
        self.places = Places()
        batches = self._measured(num_proc).with_format("arrow").iter(MEASURED_AT_ONCE)
        for index, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            if str(row["reason"]).startswith(FAULTS_OF_FILES):  # the cache cannot know of files that came since
                row = encoder.measure(self.chats[index])
            found = judge(row, index, encoder)
            if isinstance(found, Broken):
                self.skipped.add([found])
            else:
                self.indices.append(index)
                self.lengths.append(found)
                self.places += places_of(row)
        num_skipped = len(self.chats) - len(self.indices)
        if not self.indices:
            raise ValueError(f"none of the {len(self.chats)} chats can be used: {self.skipped}")
        if num_skipped:
            logger.warning("skipped %d of %d chats: %s", num_skipped, len(self.chats), self.skipped)
        if self.places.are_pixels and encoder.limits.coordinates == "relative":
            logger.warning(
                "coordinates look like pixels: none of %d boxes and points lies beyond its picture's own size, as some "
                "from 0 to 1000, relative to the picture's sides, would",
                self.places.num_places,
            )

    def _measured(self, num_proc: int | None) -> datasets.Dataset:
        measure = partial(
            self.chats.map,
            self.encoder.measure,
            remove_columns=self.chats.column_names,
            features=datasets.Features(MEASURED_FEATURES),
            num_proc=num_proc,
            desc="Measuring chats",
            new_fingerprint=Hasher.hash([self.chats._fingerprint, measuring_key(self.encoder)]),
        )
        try:
            return measure()
        except (ArrowException, OSError) as error:  # a file in the cache that was cut short
            logger.warning("measured chats in the cache of `datasets` cannot be read, measuring again: %s", error)
            return measure(load_from_cache_file=False)

    def __len__(self) -> int:
        """Usable chats."""
        return len(self.indices)

    @property
    def sample_ids(self) -> list[int]:
        """The `sample_id` of every usable chat."""
        return self.indices

    def chat(self, number: int) -> Any:
        """A usable chat as it is in the data."""
        return self.chats[self.indices[number]]

    def __getitem__(self, number: int) -> Sample | Broken:
        """A sample, or why there is none after all: some faults show only when pixels are decoded."""
        index = self.indices[number]
        return self.encoder.encode(self.chats[index], index)


class Mixture(torch.utils.data.Dataset):
    """Several sources as one data set, with the chats of each as often as its weight says.

    A weight of 2 takes every chat twice, 0.25 a quarter of them, which the seed chooses; 1.5 each once, and half again.

    Attributes:
        indices: (source, number in it) of every entry; entries of one chat share its `sample_id`.
        lengths: columns that each takes in a packed row.

    Args:
        sources: with encoders of their own, since relative paths of pictures start at each one's folder.
        weights: positive, one for each source.
        seed: of the choice.

    Raises:
        ValueError: a weight leaves nothing of a source.
    """

    def __init__(self, sources: Sequence[ChatSamples], weights: Sequence[float], seed: int):
        self.sources = sources
        # A sample's noise depends on its id: sources must not share one.
        self.first_ids = [0, *accumulate(len(source.chats) for source in sources)]
        self.indices = [(place, number) for place, number in enumerate_shares(map(len, sources), weights, seed)]
        self.lengths = [sources[place].lengths[number] for place, number in self.indices]

    def __len__(self) -> int:
        """Entries of an epoch."""
        return len(self.indices)

    @property
    def encoder(self) -> ChatEncoder:
        """That of the first source; those of the others differ in their folders alone."""
        return self.sources[0].encoder

    @property
    def sample_ids(self) -> list[int]:
        """The `sample_id` of every entry."""
        return [self.first_ids[place] + self.sources[place].indices[number] for place, number in self.indices]

    def chat(self, entry: int) -> Any:
        """An entry's chat as it is in the data."""
        place, number = self.indices[entry]
        return self.sources[place].chat(number)

    def __getitem__(self, entry: int) -> Sample | Broken:
        """A sample, or why there is none after all."""
        place, number = self.indices[entry]
        found = self.sources[place][number]
        return replace(found, sample_id=self.first_ids[place] + self.sources[place].indices[number])


def enumerate_shares(sizes: Iterable[int], weights: Sequence[float], seed: int) -> Iterator[tuple[int, int]]:
    """(source, number) of the chats of an epoch, each source's as often as its weight says."""
    for place, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        whole = int(weight)
        part = round((weight - whole) * size)
        if not whole and not part:
            raise ValueError(
                f"a weight of {weight:g} leaves nothing of the {size} chats of source {place} (of 0, 1, ...)"
            )
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:part].sort().values
        yield from ((place, number) for number in chain(*repeat(range(size), whole), chosen.tolist()))


def measuring_key(encoder: ChatEncoder) -> str:
    """The settings on which the measures of a chat depend."""
    processor = encoder.processor
    settings = [part.to_dict() for part in (processor.image_processor, processor.video_processor) if part is not None]
    vocabulary = sorted(encoder.tokenizer.get_vocab().items())
    known = [__version__, settings, processor.chat_template, vocabulary, str(encoder.media_folder.absolute())]
    return json.dumps([*known, *MEASURED_FEATURES], sort_keys=True, default=str)


def judge(row: Mapping[str, Any], index: int, encoder: ChatEncoder) -> int | Broken:
    """Columns that a measured chat takes, or why it is left out."""
    if row["reason"] is not None:
        return Broken(index, row["reason"], row["detail"])
    responses = list(zip(row["starts"], row["ends"], strict=True))
    measured = Measured(row["length"], responses, row["short_side"], row["aspect_ratio"], places_of(row))
    try:
        encoder.limits.check(measured)
    except BrokenChat as error:
        return Broken(index, error.reason, error.detail)
    return encoder.limits.columns(measured)


def places_of(row: Mapping[str, Any]) -> Places:
    """The boxes and points of a measured chat."""
    return Places(*(row[each.name] for each in fields(Places)))


def stream_chats(
    chats: datasets.IterableDataset, encoder: ChatEncoder, seed: int = 0, buffer_size: int = 1000
) -> datasets.IterableDataset:
    """A stream of undecoded chats in an order that depends on the seed and the epoch (`set_epoch`).

    It stays a data set of `datasets`, whose files the workers of the data loader share. In training every process reads
    all of it and `PackingCollator` encodes the process's own batches alone, so that all have equally many and train on
    the chats that one process would take. The `sample_id` of a chat is a hash of its tokens.

    Raises:
        ValueError: none of the first 16 chats can be used.
    """
    chats = without_decoding(check_columns(chats, "the stream"))
    skipped = SkippedChats()
    for example in islice(chats, PROBE_SIZE):
        found = encoder.encode(example)
        if isinstance(found, Sample):
            return chats.shuffle(seed=seed, buffer_size=buffer_size) if buffer_size > 1 else chats
        skipped.add([found])
    raise ValueError(f"none of the first {sum(skipped.counts.values())} chats of the stream can be used: {skipped}")


@dataclass
class PackedBatch(PackedRows):
    """Packed rows, and the chats of the batch that were skipped."""

    broken: list[Broken] = field(default_factory=list)


@dataclass
class PackingCollator:
    """Packs a list of samples, broken chats and, from a stream, chats into a `PackedBatch`.

    A batch in which nothing can be trained is one row of padding. Where every process must run the vision tower in
    every step, a batch without pictures carries one blank picture that no token shows.

    Attributes:
        encoder: its limits give block size and row length.
        needs_vision: whether every batch must run the vision tower: it is trained, or its weights, even frozen, are
            sharded and gathered by all processes together.
        pad_to_multiple_of: rows are padded to a multiple of this number of columns.
        pixel_dtype: of pixels, the one that the vision tower computes in: in bfloat16 they travel in half the bytes.
    """

    encoder: ChatEncoder
    needs_vision: bool = True
    pad_to_multiple_of: int = 1
    pixel_dtype: torch.dtype = torch.float32

    def __call__(self, batch: Sequence[Sample | Broken | Mapping[str, Any]]) -> PackedBatch:
        """Encode what is not encoded yet, and pack."""
        found = [self.encoder.encode(each) if isinstance(each, Mapping) else each for each in batch]
        tokenizer, limits = self.encoder.tokenizer, self.encoder.limits
        rows = pack(
            [each for each in found if isinstance(each, Sample)],
            limits.block_size,
            limits.max_length,
            pad_token_id=tokenizer.pad_token_id,
            response_padding_id=tokenizer.eos_token_id,
            pad_to_multiple_of=self.pad_to_multiple_of,
            noisy_copies=limits.noisy_copies,
        )
        packed = PackedBatch(**vars(rows), broken=[each for each in found if isinstance(each, Broken)])
        if self.needs_vision and not packed.visual_inputs:
            packed.visual_inputs = blank_picture(self.encoder.config.vision_config)
        for kind in MEDIA_KINDS:
            if kind.pixels in packed.visual_inputs:
                packed.visual_inputs[kind.pixels] = packed.visual_inputs[kind.pixels].to(self.pixel_dtype)
        return packed


def blank_picture(vision_config: Any) -> dict[str, torch.Tensor]:
    """The smallest picture that a vision tower takes: one feature."""
    side = vision_config.spatial_merge_size
    size = vision_config.in_channels * vision_config.temporal_patch_size * vision_config.patch_size**2
    return {
        "pixel_values": torch.zeros(side**2, size, dtype=torch.float32),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def limit_pixels(processor: Any, min_pixels: int | None, max_pixels: int | None) -> Any:
    """A copy of the processor that scales images to areas between the two, in pixels; None leaves its own limit.

    Raises:
        ValueError: the smallest area is above the largest.
    """
    processor = copy.copy(processor)
    image_processor = processor.image_processor = copy.deepcopy(processor.image_processor)
    size = dict(image_processor.size)
    for edge, name, pixels in (("shortest_edge", "min_pixels", min_pixels), ("longest_edge", "max_pixels", max_pixels)):
        if pixels is not None:
            size[edge] = pixels
            setattr(image_processor, name, pixels)  # 4.57's Pillow class reads these
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(f"`min_pixels` {size['shortest_edge']} is above `max_pixels` {size['longest_edge']}")
    image_processor.size = size
    return processor
