"""A checkpoint opened, asked and timed: what the commands, the demo page and scripts share."""

import contextlib
import copy
import json
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from ..forms_bard_vl import Form
from ..generation_config_bard_vl import SETTINGS, BardVLGenerationConfig, DecodingSettings, resolve_mask_token_id
from ..modeling_bard_vl import BardVLForConditionalGeneration
from ..processing_bard_vl import BardVLProcessor
from ..spelling_bard_vl import Spelling, spelling_of
from .checkpoints import EMBEDDED, complete_settings, find_checkpoint, read_config, reading, stored_settings
from .devices import find_device, free_memory
from .errors import UsageError, one_line
from .memory import MemoryEstimate, check_fits, estimate, read_prompt, readable, weight_bytes
from .quantization import (
    UNPACKED,
    check_quantization,
    check_stored,
    quantization_config,
    saved_bytes,
    stored_bytes,
    stored_method,
)
from .terminal import counted

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate


@dataclass
class Answer:
    """A response and what it took.

    Attributes:
        text: the response without special tokens.
        output: the `BardVLGenerationOutput`.
        prompt_length: prompt tokens, `visual_tokens` of them of pictures and videos.
        seconds: spent in `generate`, for all rows of the output.
        finish_reason: `eos`, `length`, or `stop` for a stop string or a time limit.
        num_tokens: response tokens, EOS included.
        row: of the output.
    """

    text: str
    output: Any
    prompt_length: int
    visual_tokens: int
    seconds: float
    finish_reason: str
    num_tokens: int
    row: int = 0

    @property
    def num_forwards(self) -> int:
        """Forwards of the language model, of all kinds."""
        return sum(self.output.num_forwards.values())

    def summary(self) -> str:
        """Tokens, forwards and time, in a line; also of an empty answer."""
        if not self.text.strip():
            said = f"an empty answer, of {counted(self.num_tokens, 'token')}"
            return f"{said}; prompt of {counted(self.prompt_length, 'token')}"
        encoded = int(self.output.num_encoded_tokens[self.row])
        reused = f", {encoded} of them encoded" if encoded < self.prompt_length else ""
        return (
            f"{counted(self.num_tokens, 'token')} in {counted(self.num_forwards, 'forward')} "
            f"({self.output.tokens_per_forward[self.row]:.2f} tokens per forward), {self.seconds:.1f} s, "
            f"{self.num_tokens / self.seconds:.0f} tokens/s; prompt of {counted(self.prompt_length, 'token')}{reused}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The facts that `--json` prints about an answer."""
        return {
            "response": self.text,
            "finish_reason": self.finish_reason,
            "num_tokens": self.num_tokens,
            "num_forwards": self.output.num_forwards,
            "tokens_per_forward": float(self.output.tokens_per_forward[self.row]),
            "block_step_counts": self.output.block_step_counts[self.row].tolist(),
            "prompt_tokens": self.prompt_length,
            "visual_tokens": self.visual_tokens,
            "encoded_prompt_tokens": int(self.output.num_encoded_tokens[self.row]),
            "seconds": self.seconds,
            "tokens_per_second": self.num_tokens / self.seconds,
        }


class Session:
    """A checkpoint, its processor, and its weights once they are needed.

    Args:
        name: folder or Hub id; None for the small one that a checkout of the repository has.
        settings: of generation; checked against the checkpoint at once.
        revision: branch, tag or commit of a Hub id.
        device: default: cuda, mps, xpu or cpu, the first that is there.
        dtype: of the weights, for instance `float32`; default: the checkpoint's.
        max_pixels, min_pixels: of a picture, or of a video in all its frames; default: the processor's.
        quantize: `int8` or `nf4`: linear layers of the language model in 8 or 4 bits.
        device_map: `auto` spreads the weights over all GPUs and the CPU's memory, by accelerate.
        memory: bytes that are taken to be free; default: what the device has.

    Attributes:
        settings: with what the checkpoint's name says.
        notices: lines for the user, about the checkpoint and settings.

    Raises:
        UsageError: no such checkpoint can be meant, a setting is wrong, or a package is missing.
        OSError: the checkpoint cannot be read.
        ValueError: the vocabulary lacks the mask id.
    """

    def __init__(
        self,
        name: str | None,
        settings: BardVLGenerationConfig | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_pixels: int | None = None,
        min_pixels: int | None = None,
        quantize: str | None = None,
        device_map: str | None = None,
        memory: int | None = None,
    ):
        self.name, self.where = find_checkpoint(name), {"revision": revision} if revision else {}
        self.device = find_device(device)
        self.config = read_config(self.name, **self.where)
        given = settings or BardVLGenerationConfig()
        self.settings, self.notices = complete_settings(self.name, self.config, given, **self.where)
        self.dtype = find_dtype(dtype, self.config)
        self.quantize, self.device_map, self.memory = quantize, device_map, memory
        check_quantization(quantize)
        check_stored(self.name, self.config)
        if quantize and self.is_quantized:
            raise UsageError(f"--quantize {quantize}: the weights of {self.name} are quantised already")
        if device_map not in (None, *DEVICE_MAPS):
            raise UsageError(f"--device-map must be one of {', '.join(DEVICE_MAPS)}, got {device_map}")
        with reading(self.name):
            self.processor = BardVLProcessor.from_pretrained(self.name, **self.where)
        self.processor.mask_token_id = self.mask_token_id
        set_pixels(self.processor, min_pixels, max_pixels)
        self._model: BardVLForConditionalGeneration | None = None

    @property
    def title(self) -> str:
        """The checkpoint's name without its folders or owner."""
        return "Bard-VL, the small example" if self.is_example else self.name.rstrip("/").rpartition("/")[2]

    @property
    def is_example(self) -> bool:
        """Whether it is the small checkpoint of the repository."""
        return Path(self.name).resolve() == EMBEDDED

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint's own weights are quantised."""
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def model(self) -> BardVLForConditionalGeneration:
        """The model on its device, loaded when first asked for."""
        if self._model is None:
            options: dict[str, Any] = {"dtype": self.dtype, **self.where}
            if self.quantize:
                options["quantization_config"] = quantization_config(self.quantize, self.dtype)
            if self.device_map or self.quantize or self.is_quantized:  # never whole, and never moved
                options["device_map"] = self.device_map or {"": self.device}
            # Some packages of quantised weights print while they load; standard output is for answers.
            with reading(self.name), contextlib.redirect_stdout(sys.stderr):
                model, found = AutoModelForImageTextToText.from_pretrained(
                    self.name, output_loading_info=True, **options
                )
            if missing := sorted(found["missing_keys"]):  # which transformers fills with random numbers
                others = f" and {counted(len(missing) - 1, 'other tensor')}" if len(missing) > 1 else ""
                raise OSError(f"{self.name} lacks weights that its config asks for: {missing[0]}{others}")
            self._model = (model if "device_map" in options else model.to(self.device)).eval()
        return self._model

    def encode(self, messages: list[dict[str, Any]], processor: Any = None) -> Any:
        """Model inputs of a conversation, whose pictures and videos are those of `media.read`.

        By the checkpoint's processor, or another one.
        """
        processor = processor or self.processor
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        items = [item for message in messages for item in message["content"]]
        images = [item["image"] for item in items if item["type"] == "image"]
        videos = [item["video"] for item in items if item["type"] == "video"]
        return processor(text=[text], images=images or None, videos=videos or None, return_tensors="pt")

    def longest(self, inputs: Any) -> int:
        """The longest response to a prompt, in tokens."""
        return read_prompt(self.shape, inputs, self.settings)[1].max_new_tokens

    def estimate(self, inputs: Any, **settings: Any) -> MemoryEstimate:
        """The memory of an answer, without reading the weights; `settings` are those of this answer."""
        return estimate(self.shape, *read_prompt(self.shape, inputs, self.settings, **settings), self.weights)

    def check_memory(self, inputs: Any, **settings: Any) -> None:
        """Raise `ValueError` with the estimate, and what takes less, if weights and answer exceed what is free."""
        size, resolved = read_prompt(self.shape, inputs, self.settings, **settings)
        to_read = self.weights if self._model is None else 0
        check_fits(self.shape, size, resolved, self.device, self.free_memory(), to_read, self.lighter)

    def free_memory(self) -> int | None:
        """Bytes that the device can still give, as stated or as it says; None if that is not known."""
        if self.memory is not None:
            return self.memory
        free = free_memory(self.device)
        if self.device_map is None or self.device.type == "cpu" or free is None:
            return free
        return free + (free_memory(torch.device("cpu")) or 0)  # layers that have no room on the device

    @cached_property
    def weights(self) -> int:
        """Bytes of the weights once they are loaded."""
        if self.is_quantized and stored_method(self.config) not in UNPACKED:
            return stored_bytes(self.name, self.where.get("revision")) or weight_bytes(self.shape)
        saved = saved_bytes(self.shape, self.quantize) if self.quantize else 0
        return weight_bytes(self.shape) - saved

    @property
    def lighter(self) -> tuple[tuple[str, int], ...]:
        """Other ways to load the weights, as advice and bytes."""
        if self.is_quantized:
            return ()
        plain, size = weight_bytes(self.shape), self.dtype.itemsize
        halved = [("load them by --dtype bfloat16", plain * 2 // size)] if size > 2 and not self.quantize else []
        kinds = {None: ("int8", "nf4"), "int8": ("nf4",)}.get(self.quantize, ())
        fewer = [(f"load them by --quantize {kind}", plain - saved_bytes(self.shape, kind)) for kind in kinds]
        offloaded = [("keep layers in the CPU's memory by --device-map auto", 0)]
        return (*halved, *fewer, *(offloaded if self.device.type != "cpu" and not self.device_map else ()))

    @cached_property
    def stored(self) -> BardVLGenerationConfig | None:
        """The settings that come with the checkpoint, without its weights; None if it has no file of them."""
        return stored_settings(self.name, **self.where)

    @property
    def mask_token_id(self) -> int:
        """The id of an undecided token: as set, as stored with the checkpoint, or as its config has it."""
        stated = (settings.mask_token_id for settings in (self.settings, self.stored) if settings)
        return resolve_mask_token_id(next((value for value in stated if value is not None), None), self.config)

    @cached_property
    def shape(self) -> BardVLForConditionalGeneration:
        """The model without its weights, on the meta device."""
        with torch.device("meta"):
            model = BardVLForConditionalGeneration._from_config(self.config, dtype=self.dtype)
        if self.stored is not None:
            model.generation_config = self.stored
        return model

    def read_form(self, structured: Any) -> Form | None:
        """The form of `structured`, checked before weights are read; None for none.

        Raises:
            UsageError: it is wrong, or cannot be completed in the tokens that an answer has.
        """
        if structured is None:
            return None
        try:
            form = Form.read(structured)
            self.spelling.automaton(form)
        except ValueError as error:
            raise UsageError(one_line(error)) from error
        return form

    @property
    def decoding(self) -> DecodingSettings:
        """The settings as `generate` resolves them, before a prompt is known."""
        return DecodingSettings.resolve(self.shape.merge_settings(self.settings, {}), self.config, 0)

    @property
    def spelling(self) -> Spelling:
        """The spelling of forms by the checkpoint's tokenizer."""
        vocab_size = self.config.get_text_config().vocab_size
        return spelling_of(self.processor.tokenizer, vocab_size, self.decoding.eos_token_ids[0])

    def ask(self, messages: list[dict[str, Any]], inputs: Any = None, **arguments: Any) -> Answer:
        """Answer a conversation; `inputs` spares encoding it again, other arguments are those of `generate`.

        Raises:
            ValueError: `generate` refuses something, or the device runs out of memory on the way.
        """
        return self.ask_for_all(messages, inputs, **arguments)[0]

    def ask_for_all(self, messages: list[dict[str, Any]], inputs: Any = None, **arguments: Any) -> list[Answer]:
        """The same, all answers of `num_return_sequences`."""
        inputs = (self.encode(messages) if inputs is None else inputs).to(self.device)
        model = self.model
        named = {name: value for name, value in arguments.items() if name in SETTINGS}
        start = time.perf_counter()
        try:
            output = model.generate(
                **inputs,
                generation_config=self.settings,
                return_dict_in_generate=True,
                tokenizer=self.processor,
                **arguments,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(out_of_memory(self.device, self.estimate(inputs.to("cpu"), **named))) from error
        seconds = time.perf_counter() - start
        _, settings = read_prompt(model, inputs, self.settings, **named)
        return [self.answer_of(output, row, inputs, settings, seconds) for row in range(len(output.sequences))]

    def answer_of(self, output: Any, row: int, inputs: Any, settings: DecodingSettings, seconds: float) -> Answer:
        """The answer in a row of an output."""
        length = inputs["input_ids"].shape[1]
        response = output.sequences[row, length : length + output.num_tokens[row]].tolist()
        visual = torch.isin(
            inputs["input_ids"].cpu(), torch.tensor([self.config.image_token_id, self.config.video_token_id])
        )
        return Answer(
            text=self.processor.decode(response, skip_special_tokens=True),
            output=output,
            prompt_length=length,
            visual_tokens=int(visual.sum()),
            seconds=seconds,
            finish_reason=finish_reason(response, settings.max_new_tokens, settings.eos_token_ids),
            num_tokens=len(response),
            row=row,
        )


def finish_reason(response: list[int], limit: int, eos_token_ids: Collection[int]) -> str:
    """Why a response of at most `limit` tokens ended: `eos`, `length`, or `stop` for a stop string or a time limit."""
    if response[-1] in eos_token_ids:
        return "eos"
    return "length" if len(response) == limit else "stop"


def out_of_memory(device: torch.device, estimate: MemoryEstimate) -> str:
    """The error of an answer that needs more memory than was estimated."""
    return (
        f"{device} ran out of memory; a prompt of {estimate.prompt_tokens} tokens and a response of "
        f"{estimate.new_tokens} were expected to take {readable(estimate.total)}, weights included: lower --max-pixels "
        "or --max-new-tokens"
    )


def quieten() -> None:
    """Keep transformers' progress bars and advice off standard error, where errors are one line."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def build_settings(named: dict[str, Any], others: list[str] | None = None) -> BardVLGenerationConfig:
    """Settings from options (None is unset) and from texts NAME=VALUE, whose values are JSON or plain text.

    Raises:
        UsageError: a setting is unknown, out of range, or set by the command itself.
    """
    settings = {name: value for name, value in named.items() if value is not None}
    for text in others or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, got {text!r}")
        if name in SETTINGS and SETTINGS[name].owner == "program":
            raise UsageError(f"`{name}` is the command's own")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    try:
        return BardVLGenerationConfig(**settings)
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def find_dtype(dtype: str | None, config: Any) -> torch.dtype:
    """The dtype of that name, or the checkpoint's; `UsageError` if it is none for weights."""
    stated = dtype or config.dtype or config.text_config.dtype or "float32"
    found = stated if isinstance(stated, torch.dtype) else getattr(torch, str(stated), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"--dtype must be bfloat16, float16 or float32, got {dtype}")
    return found


def set_pixels(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Bound the pixels of a picture, and of a video in all its frames; `UsageError` if the bounds cross."""
    if min_pixels and max_pixels and min_pixels > max_pixels:
        raise UsageError(f"--min-pixels {min_pixels} is more than --max-pixels {max_pixels}")
    for part in (processor.image_processor, processor.video_processor):
        if part is None:
            continue
        size = copy.copy(part.size)
        if max_pixels:
            size["longest_edge"] = max_pixels
            size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
        if min_pixels:
            size["shortest_edge"] = min_pixels
            size["longest_edge"] = max(size["longest_edge"], min_pixels)
        part.size = size
