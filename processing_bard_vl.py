"""Processor of Bard-VL: Qwen3-VL's, with one folder layout and one video prompt on every transformers line.

A folder that transformers 5 saves cannot be read by 4.57, and the prompt around a video changed between 5.9 and 5.10:
this class keeps the layout and the tokens that checkpoints were trained with.
"""

import copy
import inspect
import json
import operator
import os
from collections.abc import Mapping
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.utils import is_torchvision_available

# The loader of transformers 4.57 copies only what this file imports itself: the configuration's helper is named too.
from .compat_bard_vl import CACHE_NAMES  # noqa: F401
from .configuration_bard_vl import DEFAULT_MASK_TOKEN_ID, check_integer
from .media_bard_vl import (
    MAX_ASPECT_RATIO,
    Media,
    at_least_two,
    describe,
    qwen_vl_utils,
    read_frames,
    read_picture,
    read_video,
    unreadable,
)
from .messages_bard_vl import normalize_messages

# Names that move between lines of transformers.
try:  # >= 5.4
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as PILImageProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
except ImportError:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import (  # type: ignore[assignment]
        Qwen2VLImageProcessor as PILImageProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

# The keys of the settings files; the lines of transformers differ in the rest, and each has its defaults for it.
VISION_SETTINGS = (
    *("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "resample"),
    *("do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb"),
)
SAMPLING_SETTINGS = ("do_sample_frames", "fps", "min_frames", "max_frames")


class BardVLProcessor(Qwen3VLProcessor):
    """Turns chats with images and videos into model inputs, and ids into text.

    Batches are padded on the left. Without torchvision, images work (by Pillow, pixel values within 2/255 of
    torchvision's) and videos raise `ImportError`.

    Args:
        image_processor, tokenizer, video_processor, chat_template:
            As in `Qwen3VLProcessor`.
        mask_token_id (`int`, defaults to 151671):
            The id that stands for an undecided token. The tokenizer needs no entry for it.
    """

    mask_glyph = "░"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: Any = None,
        mask_token_id: int = DEFAULT_MASK_TOKEN_ID,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)
        self.mask_token_id = check_integer("mask_token_id", mask_token_id, minimum=0)
        self.tokenizer.padding_side = "left"
        # 5.23 announces another default, hence other token counts; None also logs that on every first video.
        if getattr(video_processor, "cap_pixels_per_frame", False) is None:
            video_processor.cap_pixels_per_frame = False

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Tokenize `text` and prepare its images and videos.

        Args:
            images, text, videos:
                As in `Qwen3VLProcessor`, and whatever `read_picture` and `read_video` take. `videos` may also be what
                `qwen_vl_utils.process_vision_info(..., return_video_metadata=True)` gives: pairs (video, metadata),
                which are not sampled a second time. Arrays and tensors are taken for RGB.
            kwargs:
                As in `Qwen3VLProcessor`, for instance `video_metadata`, `do_resize`, `padding`, `return_tensors`.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` (batch, length); with images `pixel_values` (patches,
            channels * temporal patch * patch * patch) and `image_grid_thw` (images, 3), the grid in patches; with
            videos `pixel_values_videos` and `video_grid_thw`; on transformers 5 also `mm_token_type_ids`.

        Raises:
            ValueError: the text has more or fewer placeholders than there are images or videos, or one of these cannot
                be read.
            ImportError: a video without torchvision.
        """
        images, videos = flatten_images(images), flatten_videos(videos)
        if videos and self.video_processor is None:
            raise ImportError("Video input needs torchvision: `pip install torchvision`.")
        text = as_texts(text)
        # With sanitized control tokens (5.x), placeholders that users typed don't count; only transformers knows them.
        if text is not None and not kwargs.get("sanitize_control_tokens"):
            check_placeholders(text, self.image_token, len(images), "images")
            check_placeholders(text, self.video_token, len(videos), "videos")
        if videos and text is not None:
            # From 5.10 the wrapper around the video token stays in the prompt; a bare token gives the old layout.
            wrapped = f"{self.vision_start_token}{self.video_token}{self.vision_end_token}"
            text = [sample.replace(wrapped, self.video_token) for sample in text]
        pictures = [self._picture(image, kwargs.get("do_resize") is not False) for image in images]
        clips, times = self._videos(videos, kwargs)
        processor = copy.copy(self)
        processor.image_processor = sized_apart(self.image_processor, "images", images)
        processor.video_processor = sized_apart(self.video_processor, "videos", videos)
        given = {"images": pictures or None, "text": text, "videos": clips or None}
        return super(BardVLProcessor, processor).__call__(**given, **{**kwargs, **times})

    def _picture(self, image: Any, is_resized: bool = True) -> Any:
        """A picture's pixels, in the size that its item states if it does."""
        sizes = image.sizes if isinstance(image, Media) else {}
        source = image.source if isinstance(image, Media) else image
        if num_dims(source) and not sizes:
            return source
        picture = read_picture(source)
        if (is_resized or sizes) and max(picture.size) > MAX_ASPECT_RATIO * min(picture.size):
            ratio = max(picture.size) / min(picture.size)
            raise ValueError(
                f"{describe(source)}: absolute aspect ratio must be smaller than {MAX_ASPECT_RATIO}, got {ratio:.5g}"
            )
        if not sizes:
            return picture
        try:
            return picture.resize(stated_size(picture.size, sizes, self.image_processor))
        except ValueError as error:
            raise unreadable(source, "picture", error) from error

    def _videos(self, videos: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Frames of each video, and the arguments that go with them: their times, and that nobody samples again."""
        given = kwargs.get("video_metadata")
        if given is not None:
            if any(is_pair(video) for video in videos):
                raise ValueError("Video metadata came twice: beside the videos and as `video_metadata`.")
            bare = [video.source if isinstance(video, Media) else video for video in videos]
            return [at_least_two(frames_of(video)) for video in bare], {}
        is_known = [isinstance(video, (Media, str, os.PathLike)) or is_pair(video) for video in videos]
        if not any(is_known):  # as in transformers, which takes them for 24 frames per second
            return [at_least_two(frames_of(video)) for video in videos], {}
        if not all(is_known):
            raise ValueError("give every video of a call its metadata, or none")
        stated = {**kwargs, **(kwargs.get("videos_kwargs") or {})}
        pairs = [self._video(video, stated) for video in videos]
        frames, metadata = (list(column) for column in zip(*pairs, strict=True))
        return [at_least_two(one) for one in frames], {"video_metadata": metadata, "do_sample_frames": False}

    def _video(self, video: Any, stated: dict[str, Any]) -> tuple[Any, Any]:
        """A video's frames, in the size that its item states if it does, and their times."""
        if is_pair(video):
            video, times = video.source if isinstance(video, Media) else video
            return frames_of(video), times
        rates = {name: stated[name] for name in ("fps", "num_frames") if stated.get(name) is not None}
        sample: Any = partial(self.video_processor.sample_frames, **rates)
        if stated.get("do_sample_frames") is False:
            sample = all_frames
        frames, times = read_video(video, sample, is_sampled=bool(rates) or sample is all_frames)
        sizes = video.sizes if isinstance(video, Media) else {}
        if sizes:
            item = {"video": as_pictures(frames), **sizes}
            try:
                frames = qwen_vl_utils().fetch_video(item, image_patch_size=self.video_processor.patch_size)
            except (ValueError, AssertionError) as error:
                raise unreadable(video, "video", error) from error
        return frames, times

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers 5, for every message form that `qwen_vl_utils` takes; see `normalize_messages`.

        An item may state its size (`min_pixels`, `max_pixels`, `resized_height` with `resized_width`, of a video
        `total_pixels`) and a video its frames (`fps` or `nframes`, `min_frames`, `max_frames`, `video_start`,
        `video_end`), all as in qwen_vl_utils. Single frames stand for 2 a second unless the item says `sample_fps`, or
        the call gives their times as `video_metadata`.

        Raises:
            ValueError: a message or an item has no form that is known.
        """
        kwargs.pop("load_audio_from_video", None)  # `transformers serve` asks for it; the model has no ears
        if "processor_kwargs" not in inspect.signature(super().apply_chat_template).parameters:
            kwargs |= kwargs.pop("processor_kwargs", None) or {}
        return super().apply_chat_template(normalize_messages(conversation), *args, **kwargs)

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Text of each row of ids, without masks and padding; other arguments as in the tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(self._without_fillers(as_ids(sequences)), *args, **kwargs)

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Text of ids, without masks and padding, or of each row; other arguments as in the tokenizer's `decode`."""
        ids = as_ids(token_ids)
        if ids and isinstance(ids[0], list):
            return self.batch_decode(ids, *args, **kwargs)
        return self.tokenizer.decode(self._without_fillers(ids), *args, **kwargs)

    def decode_draft(
        self, token_ids: Any, mask_token_id: int | None = None, skip_special_tokens: bool = True, **kwargs: Any
    ) -> str:
        """Text of one row of ids (length,) in which each mask shows as `mask_glyph`: for drafts and history."""
        mask_token_id = self.mask_token_id if mask_token_id is None else mask_token_id
        runs = groupby(as_ids(token_ids), key=lambda token_id: token_id == mask_token_id)
        pieces = [(is_mask, list(run)) for is_mask, run in runs]
        kwargs["skip_special_tokens"] = skip_special_tokens
        return "".join(
            self.mask_glyph * len(run) if is_mask else self.tokenizer.decode(run, **kwargs) for is_mask, run in pieces
        )

    def _without_fillers(self, ids: list[Any]) -> list[Any]:
        if ids and isinstance(ids[0], list):
            return [self._without_fillers(row) for row in ids]
        return [token_id for token_id in ids if token_id not in (self.mask_token_id, self.tokenizer.pad_token_id)]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write a folder that transformers 4.57 and 5 read alike, with the code and its `auto_map`.

        Args:
            save_directory: Made if it does not exist.
            push_to_hub: Upload as well, to `repo_id` or else a repository named like the folder.
            kwargs: Arguments of `push_to_hub`, used only then.

        Returns:
            The path of processor_config.json, in a list.

        Raises:
            ImportError: without torchvision there are no video settings to write.
        """
        if self.video_processor is None:
            raise ImportError("Saving needs torchvision: without it the folder would lack the video settings.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        custom_object_save(self, folder)
        name = type(self).__name__
        auto_map = {"AutoProcessor": f"{type(self).__module__.rpartition('.')[2]}.{name}"}
        main = {"processor_class": name, "auto_map": auto_map, "mask_token_id": self.mask_token_id}
        image = vision_settings(self.image_processor, VISION_SETTINGS)
        video = vision_settings(self.video_processor, (*VISION_SETTINGS, *SAMPLING_SETTINGS))
        # Up to 5.3 the torchvision class has this name, later lines still know it.
        image |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": name}
        video |= {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": name}
        write_json(folder / "processor_config.json", main)
        write_json(folder / "preprocessor_config.json", image)
        write_json(folder / "video_preprocessor_config.json", video)
        save_tokenizer(self.tokenizer, self.chat_template, folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / "processor_config.json")]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept a missing video processor: without torchvision there is none."""
        if argument_name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if is_torchvision_available():
            return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        settings, _ = PILImageProcessor.get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        size = settings.get("size", {})  # 4.57's Pillow class forgets it, both know the pair of pixel counts
        pixels = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
        image_processor = PILImageProcessor.from_pretrained(pretrained_model_name_or_path, **{**pixels, **kwargs})
        return [image_processor, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs), None]


def flatten_images(images: Any) -> list[Any]:
    """One image, a list, or a list per sample -> flat list; transformers 4.57 refuses samples without an image."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)) or num_dims(images) == 4 or is_column(images):
        return [image for item in images for image in flatten_images(item)]
    return [images]


def flatten_videos(videos: Any) -> list[Any]:
    """One video, a list, or a list per sample -> flat list; a list of frames is one video."""
    if videos is None:
        return []
    if is_video(videos):
        return [videos]
    return [video for item in videos if item is not None for video in ([item] if is_video(item) else item)]


def is_video(item: Any) -> bool:
    """Whether `item` is an address, an array (frames, ...), a list of frames or a pair (video, metadata)."""
    if isinstance(item, (list, tuple)) and not is_pair(item):
        return len(item) > 0 and not isinstance(item[0], (str, list, tuple, Media)) and num_dims(item[0]) in (0, 3)
    return isinstance(item, (str, os.PathLike, tuple, Media)) or num_dims(item) == 4


def is_column(item: Any) -> bool:
    """Whether `item` is an array or a column of a table that holds objects."""
    return str(getattr(item, "dtype", None)) == "object"


def is_pair(item: Any) -> bool:
    """Whether `item` is (video, metadata), in a message or not."""
    item = item.source if isinstance(item, Media) else item
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping)


def num_dims(item: Any) -> int:
    """Dimensions of a tensor or array; 0 for a Pillow image, which counting should not decode."""
    return getattr(item, "ndim", 0)


def check_placeholders(text: list[str], token: str, num_given: int, kind: str) -> None:
    """Raise `ValueError` unless `text` has one `token` for each of the `num_given` images or videos."""
    num_in_text = sum(sample.count(token) for sample in text)
    if num_in_text != num_given:
        raise ValueError(f"The text has {num_in_text} {token} tokens for {num_given} {kind}.")


def as_texts(text: Any) -> Any:
    """A text or several as a list of `str`; None stays None."""
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(sample, str) for sample in texts):
        raise ValueError(f"`text` must be a string or several, got {text!r:.80}")
    return [str(sample) for sample in texts]


def frames_of(video: Any) -> Any:
    """A video whose frames are pictures, if it is a list of what holds them."""
    return read_frames(video) if isinstance(video, (list, tuple)) else video


def as_pictures(frames: Any) -> list[Image.Image]:
    """Frames of any reader (frames, height, width, 3) or (frames, 3, height, width) as pictures."""
    if isinstance(frames, list):
        return frames
    frames = torch.as_tensor(frames)
    frames = frames if frames.shape[-1] == 3 else frames.permute(0, 2, 3, 1)
    return [Image.fromarray(frame.numpy()) for frame in frames]


def all_frames(metadata: Any) -> range:
    """Indices of every frame of a video."""
    return range(metadata.total_num_frames)


def stated_size(size: tuple[int, int], sizes: Mapping[str, Any], image_processor: Any) -> tuple[int, int]:
    """Width and height that a picture gets by what its item states, with the defaults of qwen_vl_utils."""
    factor = image_processor.patch_size * image_processor.merge_size
    least, most = 4 * factor**2, 16384 * factor**2
    if "resized_height" in sizes:
        height, width = smart_resize(sizes["resized_height"], sizes["resized_width"], factor, least, most)
    else:
        least, most = sizes.get("min_pixels", least), sizes.get("max_pixels", most)
        if least > most:
            raise ValueError(f"the least pixels, {least}, are more than the most, {most}")
        height, width = smart_resize(size[1], size[0], factor, least, most)
    return width, height


def sized_apart(processor: Any, kind: str, media: list[Any]) -> Any:
    """An image or video processor for one call, which leaves the size of media that state their own."""
    is_sized = [isinstance(one, Media) and bool(one.sizes) for one in media]
    return OneByOne(processor, kind, is_sized) if any(is_sized) else processor


class OneByOne:
    """An image or video processor for one call, in which some media have their size already.

    Args:
        processor: prepares each.
        kind: "images" or "videos".
        is_sized: which are not to be resized.
    """

    def __init__(self, processor: Any, kind: str, is_sized: list[bool]):
        self.processor, self.kind, self.is_sized = processor, kind, is_sized

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """The processor's result for all of them together."""
        media = args[0] if args else kwargs.pop(self.kind)
        metadata = kwargs.pop("video_metadata", None)
        parts = []
        for number, (one, is_sized) in enumerate(zip(media, self.is_sized, strict=True)):
            own: dict[str, Any] = {"do_resize": False} if is_sized else {}
            own |= {} if metadata is None else {"video_metadata": [metadata[number]]}
            parts.append(self.processor(**{**kwargs, **own, self.kind: [one], "return_tensors": "pt"}))
        columns = {name: [part[name] for part in parts] for name in parts[0]}
        return BatchFeature({name: joined(column) for name, column in columns.items()})


def joined(column: list[Any]) -> Any:
    """Tensors one after the other, or the members of lists."""
    return torch.cat(column) if isinstance(column[0], torch.Tensor) else list(chain(*column))


def vision_settings(processor: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The named settings of an image or video processor, its pixel budget stated by `size` alone."""
    settings = processor.to_dict()
    # 4.57 keeps what a caller set as `min_pixels` and `max_pixels` beside a `size` that it then ignores.
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if settings.get(name) is not None:
            settings["size"] = {**settings["size"], edge: settings[name]}
    return {name: settings[name] for name in names if name in settings}


def as_ids(token_ids: Any) -> list[Any]:
    """Ids as a list, or a list of rows, from tensors, arrays, sequences or a single id; `ValueError` for others."""
    ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    rows = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    return [as_ids(row) if isinstance(row, (list, tuple)) or num_dims(row) else as_id(row) for row in rows]


def as_id(token_id: Any) -> int:
    """An id as `int`, from any integer."""
    try:
        number = operator.index(token_id)
    except TypeError as error:
        raise ValueError(f"token ids must be integers, got {token_id!r:.80}") from error
    if isinstance(token_id, bool) or number < 0:
        raise ValueError(f"token ids must be integers of at least 0, got {token_id!r:.80}")
    return number


def save_tokenizer(tokenizer: Any, chat_template: Any, folder: Path) -> None:
    """Write the tokenizer's files in the spelling of 4.57, which 5.x reads as well."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template
    if tokenizer.is_fast:
        # State of the last call; 5.x writes it into the file and no vocab.json and merges.txt beside it.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.model.save(str(folder))
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").unlink(missing_ok=True)  # a file of an older save would win over the .jinja
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):  # 5.x; 4.57 expects a mapping under that name
        config["additional_special_tokens"] = extra
    elif extra:
        config["extra_special_tokens"] = extra
    for key in ("backend", "is_local", "local_files_only"):  # 5.x: facts of the machine that saved
        config.pop(key, None)
    tokens = tokenizer.added_tokens_decoder.items()
    config["added_tokens_decoder"] = {str(token_id): token.__getstate__() for token_id, token in tokens}
    write_json(path, config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["BardVLProcessor"]
