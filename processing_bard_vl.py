"""Processor of Bard-VL: Qwen3-VL's, with one folder layout and one video prompt on every transformers line.

A folder that transformers 5 saves cannot be read by 4.57, and the prompt around a video changed between 5.9 and 5.10:
this class keeps the layout and the tokens that checkpoints were trained with.
"""

import copy
import inspect
import json
import os
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.utils import is_torchvision_available

from .configuration_bard_vl import DEFAULT_MASK_TOKEN_ID

try:  # transformers >= 5.4
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as PILImageProcessor
except ImportError:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import (  # type: ignore[assignment]
        Qwen2VLImageProcessor as PILImageProcessor,
    )

# What the settings files state; the lines of transformers differ in the rest, and each has its defaults for it.
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
        self.mask_token_id = mask_token_id
        self.tokenizer.padding_side = "left"
        # 5.23 announces another default, hence other token counts; None also logs that on every first video.
        if getattr(video_processor, "cap_pixels_per_frame", False) is None:
            video_processor.cap_pixels_per_frame = False

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Tokenize `text` and prepare its images and videos.

        Args:
            images, text, videos:
                As in `Qwen3VLProcessor`. `videos` may also be what `qwen_vl_utils.process_vision_info(...,
                return_video_metadata=True)` gives: pairs (video, metadata), which are not sampled a second time.
            kwargs:
                As in `Qwen3VLProcessor`, for instance `video_metadata`, `do_resize`, `padding`, `return_tensors`.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` (batch, length); with images `pixel_values` (patches,
            channels * temporal patch * patch * patch) and `image_grid_thw` (images, 3), the grid in patches; with
            videos `pixel_values_videos` and `video_grid_thw`; on transformers 5 also `mm_token_type_ids`.

        Raises:
            ValueError: the text has more or fewer placeholders than there are images or videos.
            ImportError: a video without torchvision.
        """
        images, videos = flatten_images(images), flatten_videos(videos)
        if videos and self.video_processor is None:
            raise ImportError("Video input needs torchvision: `pip install torchvision`.")
        if videos and all(is_pair(video) for video in videos):
            if kwargs.get("video_metadata") is not None:
                raise ValueError("Video metadata came twice: beside the videos and as `video_metadata`.")
            videos, kwargs["video_metadata"] = [list(column) for column in zip(*videos, strict=True)]
            kwargs.setdefault("do_sample_frames", False)
        text = [text] if isinstance(text, str) else text
        # With sanitized control tokens (5.x), placeholders that users typed don't count; only transformers knows them.
        if text is not None and not kwargs.get("sanitize_control_tokens"):
            check_placeholders(text, self.image_token, len(images), "images")
            check_placeholders(text, self.video_token, len(videos), "videos")
        if videos and text is not None:
            # From 5.10 the wrapper around the video token stays in the prompt; a bare token gives the old layout.
            wrapped = f"{self.vision_start_token}{self.video_token}{self.vision_end_token}"
            text = [sample.replace(wrapped, self.video_token) for sample in text]
        return super().__call__(images=images or None, text=text, videos=videos or None, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers 5, for every message form that `qwen_vl_utils` takes.

        4.57 refuses plain string contents with `tokenize=True`, drops images in the form `image_url` silently, and so
        it does with `processor_kwargs`.
        """
        kwargs.pop("load_audio_from_video", None)  # `transformers serve` asks for it; the model has no ears
        if "processor_kwargs" not in inspect.signature(super().apply_chat_template).parameters:
            kwargs |= kwargs.pop("processor_kwargs", None) or {}
        return super().apply_chat_template(normalize_messages(conversation), *args, **kwargs)

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Text of each row of ids, without masks and padding; other arguments as in the tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(self._without_fillers(sequences), *args, **kwargs)

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Text of ids, without masks and padding; other arguments as in the tokenizer's `decode`."""
        return self.tokenizer.decode(self._without_fillers(token_ids), *args, **kwargs)

    def decode_draft(
        self, token_ids: Any, mask_token_id: int | None = None, skip_special_tokens: bool = True, **kwargs: Any
    ) -> str:
        """Text of one row of ids (length,) in which each mask shows as `mask_glyph`: for drafts and history."""
        mask_token_id = self.mask_token_id if mask_token_id is None else mask_token_id
        runs = groupby(as_list(token_ids), key=lambda token_id: token_id == mask_token_id)
        pieces = [(is_mask, list(run)) for is_mask, run in runs]
        kwargs["skip_special_tokens"] = skip_special_tokens
        return "".join(
            self.mask_glyph * len(run) if is_mask else self.tokenizer.decode(run, **kwargs) for is_mask, run in pieces
        )

    def _without_fillers(self, token_ids: Any) -> list[Any]:
        ids = as_list(token_ids)
        if ids and (isinstance(ids[0], (list, tuple)) or num_dims(ids[0]) > 0):
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
    if isinstance(images, (list, tuple)) or num_dims(images) == 4:
        return [image for item in images for image in flatten_images(item)]
    return [images]


def flatten_videos(videos: Any) -> list[Any]:
    """One video, a list, or a list per sample -> flat list; a list of frames is one video."""
    if videos is None:
        return []
    if is_video(videos):
        return [videos]
    return [video for item in videos for video in ([item] if is_video(item) else item)]


def is_video(item: Any) -> bool:
    """Whether `item` is an address, an array (frames, ...), a list of frames or a pair (video, metadata)."""
    if isinstance(item, (list, tuple)) and not is_pair(item):
        return len(item) > 0 and not isinstance(item[0], (str, list, tuple)) and num_dims(item[0]) in (0, 3)
    return isinstance(item, (str, os.PathLike, tuple)) or num_dims(item) == 4


def is_pair(item: Any) -> bool:
    """Whether `item` is (video, metadata)."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping)


def num_dims(item: Any) -> int:
    """Dimensions of a tensor or array; 0 for a Pillow image, which counting should not decode."""
    return getattr(item, "ndim", 0)


def check_placeholders(text: list[str], token: str, num_given: int, kind: str) -> None:
    """Raise `ValueError` unless `text` has one `token` for each of the `num_given` images or videos."""
    num_in_text = sum(sample.count(token) for sample in text)
    if num_in_text != num_given:
        raise ValueError(f"The text has {num_in_text} {token} tokens for {num_given} {kind}.")


def normalize_messages(conversation: Any) -> Any:
    """Messages, or a list of conversations, with every content as a list of typed items; changes nothing in place."""
    if isinstance(conversation, (list, tuple)):
        return [normalize_messages(message) for message in conversation]
    if not isinstance(conversation, dict):
        return conversation
    content = conversation.get("content")
    if isinstance(content, str):
        return {**conversation, "content": [{"type": "text", "text": content}]}
    if isinstance(content, (list, tuple)):
        return {**conversation, "content": [normalize_item(item) for item in content]}
    return conversation


def normalize_item(item: dict[str, Any]) -> dict[str, Any]:
    """Content item with its `type` stated, images under `image` and local files as plain paths."""
    kind = item.get("type") or next((key for key in ("image", "image_url", "video", "text") if key in item), "text")
    item = {**item, "type": kind}
    if kind == "image_url":
        url = item.pop("image_url")
        item |= {"type": "image", "image": url["url"] if isinstance(url, dict) else url}
    for key in ("image", "video"):
        if isinstance(item.get(key), str):
            item[key] = item[key].removeprefix("file://")
    return item


def vision_settings(processor: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The named settings of an image or video processor, its pixel budget stated by `size` alone."""
    settings = processor.to_dict()
    # 4.57 keeps what a caller set as `min_pixels` and `max_pixels` beside a `size` that it then ignores.
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if settings.get(name) is not None:
            settings["size"] = {**settings["size"], edge: settings[name]}
    return {name: settings[name] for name in names if name in settings}


def as_list(token_ids: Any) -> list[Any]:
    """Ids as a list, from a tensor, an array, a sequence or a single id."""
    ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]


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
