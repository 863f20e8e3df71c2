"""The settings of `generate`: one class that stores, loads and validates them, and one that holds them resolved."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .compat_bard_vl import SettingsFile, plain_defaults
from .configuration_bard_vl import check_integer
from .remasking_bard_vl import REMASKING_RULES, REVISION_THRESHOLDS

DEFAULT_EOS_TOKEN_ID = 151645  # <|im_end|>, for published checkpoints that state none

DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 256,
    "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": 0.9,
    "entropy_bound": 0.1,
    "factor": 1.0,
    "check_interval": 1,
    "top_k": 0,
    "top_p": 1.0,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "return_step_stats": False,
    "output_history": False,
}
BLOCK_DIFFUSION_FIELDS = (
    "block_size",
    "denoising_steps",
    "remasking_strategy",
    "confidence_threshold",
    "entropy_bound",
    "factor",
    "revision",
    "revision_threshold",
    "check_interval",
    "mask_token_id",
    "seed",
    "return_step_stats",
    "output_history",
)
SAMPLING_FIELDS = ("do_sample", "temperature", "top_k", "top_p")
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARED_FIELDS = (
    "max_new_tokens",
    "max_length",
    "max_time",
    "stop_strings",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "sequence_bias",
    "num_return_sequences",
    "return_dict_in_generate",
    "use_cache",
    "prefill_chunk_size",
    "cache_implementation",
)
FIELDS = BLOCK_DIFFUSION_FIELDS + SAMPLING_FIELDS + TOKEN_FIELDS + SHARED_FIELDS


class BardVLGenerationConfig(SettingsFile):
    """Settings of block-diffusion decoding, saved in and loaded from `generation_config.json`.

    A field that is None is unset: `generate` then takes the default named here.

    Args:
        max_new_tokens (`int`, defaults to 256): response tokens at most. A limit, as is the model's last position: a
            response ends with the last whole block before it.
        max_length (`int`): prompt and response tokens at most, read where `max_new_tokens` is unset.
        max_time (`float`): seconds after which a row ends with the block that it finishes next.
        stop_strings (`str` or list): end a response at the first of these texts; needs `tokenizer=` in `generate`.
        block_size (`int`, defaults to the model config's): tokens denoised together. Never stored in the file: it
            is a fact of the weights.
        denoising_steps (`int`, defaults to `block_size`): steps per block at most, 1 to `block_size`.
        remasking_strategy (`str`, defaults to `"low_confidence_dynamic"`): which positions commit at a step.
            `"low_confidence_static"` and `"low_confidence_dynamic"` are the reference's; `"margin"` ranks by the lead
            of the first token over the second; `"entropy_bounded"` and `"factor"` bound what commits together.
        confidence_threshold (`float` in [0, 1], defaults to 0.9): commit what the model finds more probable than this;
            for `"margin"`, what leads by more.
        entropy_bound (`float`, defaults to 0.1): nats, for `"entropy_bounded"`.
        factor (`float`, defaults to 1): for `"factor"`.
        revision (`"overwrite"` or `"remask"`): let later steps of a block change tokens committed before: to another
            token more probable than the threshold, or back to a mask when less probable. Off by default; for models
            trained with visible corruption.
        revision_threshold (`float` in [0, 1], defaults to 0.9 for overwriting, 0.1 for remasking).
        temperature (`float`, defaults to 0, or 1 with `do_sample=True`): 0 is greedy.
        do_sample (`bool`): False forces greedy decoding whatever the temperature.
        top_k (`int`, defaults to 0, off), top_p (`float`, defaults to 1, off): sample among the most probable tokens.
        seed (`int`): repeats a call that samples, whatever other calls do; arguments `seed`, `generator` come first.
        repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens, sequence_bias: as in transformers,
            a penalty counts the prompt and the committed tokens left of a position. No banned phrase and no repeated
            n-gram comes out, also where tokens commit together; biased phrases do as if chosen from left to right:
            a token whose bias depends on an undecided one waits, and the leftmost commit in its stead.
        num_return_sequences (`int`, defaults to 1): responses per prompt; the prompt is encoded once.
        check_interval (`int`, defaults to 1): forwards between two looks of the host at who has ended. With 1 the
            counts are exact and windows as narrow as can be; more saves synchronisations on a GPU, makes every window
            two blocks wide, and may run up to that many forwards too many. Streamers, criteria, processors and history
            look at every step.
        prefill_chunk_size (`int`): tokens of a prompt that are encoded together, cut to whole blocks; bounds the
            memory that a long prompt takes, and costs a forward a chunk.
        cache_implementation (`"dynamic"` or `"static"`): a static cache has fixed shapes, and its steps are compiled,
            once a shape: rows, block size, columns in multiples of 256, and what the rule ranks by. Ended rows stay
            until all have ended.
        mask_token_id, eos_token_id, pad_token_id, bos_token_id: token ids; default to the model config's.
        return_dict_in_generate, return_step_stats, output_history (`bool`): what `generate` returns.

    Raises:
        ValueError: a value is out of range, or asks for something that block diffusion decoding does not do (beams,
            assisted decoding, constraints, ...). The message names field and value.
    """

    def __init__(self, **kwargs: Any):
        unknown = [name for name in kwargs if name not in FIELDS and not name.startswith("_")]
        unknown = sorted(set(unknown) - set(plain_defaults()) - {"transformers_version"})
        if unknown:
            raise ValueError(f"unknown generation settings: {', '.join(unknown)}")
        for name in BLOCK_DIFFUSION_FIELDS:
            setattr(self, name, kwargs.pop(name, None))
        kwargs["sequence_bias"] = bias_pairs(kwargs.get("sequence_bias"))
        self._known = False  # the parent validates before all fields are there
        super().__init__(**{name: value for name, value in kwargs.items() if value is not None})
        # transformers 4 has defaults where 5 has None: what nobody set is None here on both.
        for name in SAMPLING_FIELDS + TOKEN_FIELDS + SHARED_FIELDS:
            setattr(self, name, kwargs.get(name))
        del self._known
        self.validate()

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check every field; raise `ValueError` with the name and the value of the first that is wrong."""
        if "_known" in vars(self):
            return
        for name, minimum in (("max_new_tokens", 1), ("max_length", 1), ("block_size", 1), ("denoising_steps", 1),
                              ("num_return_sequences", 1), ("top_k", 0), ("mask_token_id", 0), ("pad_token_id", 0),
                              ("no_repeat_ngram_size", 0),
                              ("check_interval", 1), ("prefill_chunk_size", 1)):  # fmt: skip
            check_integer(name, getattr(self, name), minimum=minimum, optional=True)
        check_number("confidence_threshold", self.confidence_threshold, 0.0, 1.0)
        check_number("entropy_bound", self.entropy_bound, 0.0, math.inf)
        check_number("factor", self.factor, 0.0, math.inf, open_below=True)
        check_number("revision_threshold", self.revision_threshold, 0.0, 1.0)
        check_choice("revision", self.revision, list(REVISION_THRESHOLDS))
        check_number("temperature", self.temperature, 0.0, math.inf)
        check_number("top_p", self.top_p, 0.0, 1.0, open_below=True)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_below=True)
        check_number("max_time", self.max_time, 0.0, math.inf)
        check_choice("remasking_strategy", self.remasking_strategy, list(REMASKING_RULES))
        check_choice("cache_implementation", self.cache_implementation, ["dynamic", "static"])
        check_choice("use_cache", self.use_cache, [True])
        for name in ("do_sample", "return_dict_in_generate", "return_step_stats", "output_history"):
            check_choice(name, getattr(self, name), [True, False])
        if self.block_size is not None and self.denoising_steps is not None and self.denoising_steps > self.block_size:
            raise ValueError(
                f"`denoising_steps` must be between 1 and `block_size` = {self.block_size}, got {self.denoising_steps}"
            )
        for token_id in token_ids(self.eos_token_id):
            check_integer("eos_token_id", token_id, minimum=0)
        check_texts("stop_strings", self.stop_strings)
        check_banned("suppress_tokens", self.suppress_tokens, is_id, "token ids")
        check_banned("bad_words_ids", self.bad_words_ids, is_word, "non-empty lists of token ids")
        check_banned(
            "sequence_bias", bias_pairs(self.sequence_bias), is_bias, "pairs of a list of token ids and a number"
        )
        check_seed(self.seed)
        for name, neutral in plain_defaults().items():
            value = getattr(self, name, None)
            if name not in FIELDS and value not in (None, False, *neutral):
                raise ValueError(f"`{name}={value!r}` is not supported by block-diffusion decoding")

    def explicit(self) -> dict[str, Any]:
        """The fields that are set, by name."""
        fields = {name: getattr(self, name) for name in FIELDS if getattr(self, name, None) is not None}
        if "sequence_bias" in fields:  # servers set the other form on a copy
            fields["sequence_bias"] = bias_pairs(fields["sequence_bias"])
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """What a file stores: the rule, and the set fields but `block_size`, which config.json owns."""
        stored = {"remasking_strategy": DEFAULTS["remasking_strategy"], **self.explicit()}
        stored.pop("block_size", None)
        return {**stored, "transformers_version": self.to_dict()["transformers_version"]}

    @classmethod
    def read_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Read a file as `readable_settings` does."""
        return readable_settings(settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read settings; in a dictionary without block-diffusion fields, values equal to plain defaults are unset."""
        if "remasking_strategy" not in config_dict:
            config_dict = drop_plain_defaults(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_plain(cls, config: Any) -> "BardVLGenerationConfig":
        """Convert a config of transformers' own class as `readable_settings` does."""
        return cls(**readable_settings(drop_plain_defaults(config.to_dict())))

    @classmethod
    def from_model_config(cls, model_config: Any) -> "BardVLGenerationConfig":
        """Start from the token ids that a model config states."""
        text = model_config.get_text_config()
        ids = {name: getattr(text, name, None) for name in TOKEN_FIELDS}
        return cls(**ids)


@dataclass(frozen=True)
class DecodingSettings:
    """Every setting of one call of `generate`, resolved and checked against the model."""

    block_size: int
    denoising_steps: int
    max_new_tokens: int
    remasking_strategy: str
    confidence_threshold: float
    entropy_bound: float
    factor: float
    revision: str | None
    revision_threshold: float
    temperature: float
    top_k: int
    top_p: float
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    num_return_sequences: int
    check_interval: int
    prefill_chunk_size: int | None
    is_static: bool

    @classmethod
    def resolve(cls, config: BardVLGenerationConfig, model_config: Any, prompt_length: int) -> "DecodingSettings":
        """Fill what `config` leaves open: argument, generation config set in code, model config, default.

        Raises:
            ValueError: nothing states a block size, or a value does not fit the model.
        """
        block_size, denoising_steps = resolve_block_size(config.block_size, model_config), config.denoising_steps
        if denoising_steps is not None and denoising_steps > block_size:
            raise ValueError(
                f"`denoising_steps` must be between 1 and `block_size` = {block_size}, got {denoising_steps}"
            )
        max_new_tokens = setting(config, "max_new_tokens")
        if config.max_new_tokens is None and config.max_length is not None:
            max_new_tokens = config.max_length - prompt_length
            if max_new_tokens < 1:
                raise ValueError(
                    f"`max_length` = {config.max_length} leaves no room after {prompt_length} prompt tokens"
                )
        temperature = config.temperature
        if config.do_sample is False or (temperature is None and not config.do_sample):
            temperature = 0.0
        samples = temperature != 0
        chunk = config.prefill_chunk_size
        vocab_size = model_config.get_text_config().vocab_size
        eos = token_ids(config.eos_token_id)
        if config.eos_token_id is None and vocab_size > DEFAULT_EOS_TOKEN_ID:
            eos = (DEFAULT_EOS_TOKEN_ID,)
        pad = config.pad_token_id if config.pad_token_id is not None else (eos[0] if eos else 0)
        mask_token_id = resolve_mask_token_id(config.mask_token_id, model_config)
        for name, token_id in [("eos_token_id", token_id) for token_id in eos] + [("pad_token_id", pad)]:
            if token_id >= vocab_size:
                raise ValueError(f"`{name}` = {token_id} lies outside the vocabulary of {vocab_size} tokens")
            if token_id == mask_token_id:
                raise ValueError(f"`{name}` = {token_id} is the mask token")
        return cls(
            block_size=block_size,
            denoising_steps=block_size if denoising_steps is None else denoising_steps,
            max_new_tokens=max_new_tokens,
            remasking_strategy=setting(config, "remasking_strategy"),
            confidence_threshold=setting(config, "confidence_threshold"),
            entropy_bound=setting(config, "entropy_bound"),
            factor=setting(config, "factor"),
            revision=config.revision,
            revision_threshold=REVISION_THRESHOLDS.get(config.revision, 0.0)
            if config.revision_threshold is None
            else config.revision_threshold,
            temperature=1.0 if temperature is None else temperature,
            top_k=setting(config, "top_k") if samples else DEFAULTS["top_k"],
            top_p=setting(config, "top_p") if samples else DEFAULTS["top_p"],
            mask_token_id=mask_token_id,
            eos_token_ids=eos,
            pad_token_id=pad,
            num_return_sequences=setting(config, "num_return_sequences"),
            check_interval=setting(config, "check_interval"),
            is_static=config.cache_implementation == "static",
            prefill_chunk_size=chunk and max(chunk // block_size, 1) * block_size,
        )


def resolve_block_size(block_size: int | None, model_config: Any) -> int:
    """The block size stated by an argument, else by the model config; `ValueError` if neither does."""
    block_size = check_integer("block_size", block_size, minimum=1, optional=True)
    block_size = model_config.block_size if block_size is None else block_size
    if block_size is None:
        raise ValueError(
            "no `block_size`: neither the call nor the checkpoint's config.json states it. Pass `block_size=`; it is "
            "the number after B in the name of a published checkpoint, for instance 16 for Bard-VL-B16-Mask-4B-Instruct"
        )
    return block_size


def resolve_mask_token_id(mask_token_id: int | None, model_config: Any) -> int:
    """The mask id stated by an argument, else by the model config; `ValueError` if the vocabulary lacks it."""
    mask_token_id = model_config.mask_token_id if mask_token_id is None else mask_token_id
    vocab_size = model_config.get_text_config().vocab_size
    if check_integer("mask_token_id", mask_token_id, minimum=0) >= vocab_size:
        raise ValueError(f"`mask_token_id` = {mask_token_id} lies outside the vocabulary of {vocab_size} tokens")
    return mask_token_id


def setting(config: BardVLGenerationConfig, name: str) -> Any:
    """A field's value, or its default where it is unset."""
    value = getattr(config, name)
    return DEFAULTS[name] if value is None else value


def token_ids(value: Any) -> tuple[int, ...]:
    """One id, a list or tensor of ids, or None as a tuple of ids."""
    if value is None:
        return ()
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, list | tuple | set) else (value,)


def check_number(name: str, value: Any, low: float, high: float, open_below: bool = False) -> None:
    """Raise `ValueError` unless `value` is None or a finite number in [low, high], or (low, high] if `open_below`."""
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high or (open_below and value == low):
        end = ")" if high == math.inf else "]"
        raise ValueError(f"`{name}` must be a number in {'(' if open_below else '['}{low}, {high}{end}, got {value!r}")


def check_choice(name: str, value: Any, choices: list[Any]) -> None:
    """Raise `ValueError` unless `value` is None or one of `choices`."""
    if value is not None and value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}")


def check_texts(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is None, a text (empty for none), or a list of texts, none of them empty."""
    if value is None or value == "":
        return
    if not all(isinstance(text, str) and text for text in (value if isinstance(value, list | tuple) else [value])):
        raise ValueError(f"`{name}` must be a non-empty text or a list of them, got {value!r}")


def check_banned(name: str, value: Any, is_item: Callable[[Any], bool], items: str) -> None:
    """Raise `ValueError` unless `value` is None or a list of what `is_item` accepts and `items` names."""
    if value is not None and not (isinstance(value, list) and all(map(is_item, value))):
        raise ValueError(f"`{name}` must be a list of {items}, got {value!r}")


def bias_pairs(biases: Any) -> Any:
    """`sequence_bias` as a list of pairs: of the two forms that transformers knows, the one that JSON can hold."""
    if not isinstance(biases, dict):
        return biases
    return [[list(ids) if isinstance(ids, tuple) else ids, bias] for ids, bias in biases.items()]


def is_id(value: Any) -> bool:
    """Whether `value` is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_word(value: Any) -> bool:
    """Whether `value` is a non-empty list of token ids."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_id, value))


def is_bias(value: Any) -> bool:
    """Whether `value` is a pair of a non-empty list of token ids and a finite number."""
    if not (isinstance(value, list | tuple) and len(value) == 2 and is_word(value[0])):
        return False
    return isinstance(value[1], int | float) and not isinstance(value[1], bool) and math.isfinite(value[1])


def check_seed(value: Any) -> None:
    """Raise `ValueError` unless `value` is None or an integer that seeds a `torch.Generator`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`seed` must be an integer, got {value!r}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"`seed` must lie in [-2**63, 2**64), got {value}")


def readable_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What carries over of a file's settings: known fields, and sampling only beside a rule of block diffusion.

    A file that names no rule was written for autoregressive decoding. A checkpoint that kept the file of its source
    decodes greedily, as the published ones are meant to.
    """
    unread: set[str] = set() if settings.get("remasking_strategy") else {*SAMPLING_FIELDS, "repetition_penalty"}
    known = {*FIELDS, *plain_defaults(), "transformers_version"} - unread
    return {name: value for name, value in settings.items() if name in known}


def drop_plain_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Without None, private entries, and what equals the default of a plain `GenerationConfig`."""
    neutral = plain_defaults()
    return {
        name: value
        for name, value in settings.items()
        if value is not None and not name.startswith("_") and value not in neutral.get(name, ())
    }


__all__ = ["BardVLGenerationConfig", "DecodingSettings"]
