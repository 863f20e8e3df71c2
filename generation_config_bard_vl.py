"""The settings of `generate`: a table of them, a class that stores and loads them, one that holds them resolved."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils import logging

from .compat_bard_vl import SettingsFile, applied_defaults, plain_defaults, plain_fields
from .configuration_bard_vl import check_integer
from .remasking_bard_vl import GREEDY, REMASKING_RULES, REVISION_THRESHOLDS, Revision, Sampling

logger = logging.get_logger(__name__)

DEFAULT_EOS_TOKEN_ID = 151645  # <|im_end|>, for published checkpoints that state none


def check_number(name: str, value: Any, low: float, high: float, open_below: bool = False) -> None:
    """Raise `ValueError` unless `value` is a finite number in [low, high], or (low, high] if `open_below`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high or (open_below and value == low):
        end = ")" if high == math.inf else "]"
        raise ValueError(f"`{name}` must be a number in {'(' if open_below else '['}{low}, {high}{end}, got {value!r}")


def check_choice(name: str, value: Any, choices: list[Any]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}")


def check_texts(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a text (empty for none) or a list of texts, none of them empty."""
    texts = value if isinstance(value, list) else [value] if value != "" else []
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"`{name}` must be a non-empty text or a list of them, got {value!r}")


def check_ids_of(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a token id or a list of them."""
    for token_id in token_ids(value):
        check_integer(name, token_id, minimum=0)


def check_seed(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is an integer that seeds a `torch.Generator`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` must be an integer, got {value!r}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"`{name}` must lie in [-2**63, 2**64), got {value}")


def integer(minimum: int) -> Callable[[str, Any], Any]:
    """The check for an integer of at least `minimum`."""
    return functools.partial(check_integer, minimum=minimum)


def number(low: float, high: float, open_below: bool = False) -> Callable[[str, Any], None]:
    """The check for a number in a range."""
    return functools.partial(check_number, low=low, high=high, open_below=open_below)


def choice(*choices: Any) -> Callable[[str, Any], None]:
    """The check for one of some values."""
    return functools.partial(check_choice, choices=list(choices))


def list_of(is_item: Callable[[Any], bool], items: str) -> Callable[[str, Any], None]:
    """The check for a list of what `is_item` accepts and `items` names."""

    def check(name: str, value: Any) -> None:
        if not (isinstance(value, list) and all(map(is_item, value))):
            raise ValueError(f"`{name}` must be a list of {items}, got {value!r}")

    return check


def is_id(value: Any) -> bool:
    """Whether `value` is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_word(value: Any) -> bool:
    """Whether `value` is a non-empty list of token ids."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_id, value))


def is_bias(value: Any) -> bool:
    """Whether `value` is a pair of a non-empty list of token ids and a finite number."""
    if not (isinstance(value, list) and len(value) == 2 and is_word(value[0])):
        return False
    return isinstance(value[1], int | float) and not isinstance(value[1], bool) and math.isfinite(value[1])


@dataclass(frozen=True)
class Setting:
    """A row of the table of settings.

    Attributes:
        name: of the keyword argument, of the field of the config, and in the file.
        check: called with name and value; raises `ValueError` if the value is wrong.
        shown: the default in words, for the manual.
        help: what it does.
        default: what `generate` takes where nothing states it; None where that depends on something else.
        kind: `"diffusion"` (only block diffusion knows it), `"sampling"`, `"token"`, `"shared"` with other decoding.
        reaches: who takes it beside `generate`: `"score"`; `"vllm"`, the plugin for vLLM, which refuses every other
            setting, and takes what changes no token to no effect.
        off: values besides None that ask for nothing, where the plugin refuses the others.
        owner: who may state it where a program answers others: `"user"`; `"program"`, since it changes what `generate`
            returns; `"server"`, since it costs whoever runs the device minutes of compiling.
    """

    name: str
    check: Callable[[str, Any], Any]
    shown: str
    help: str
    default: Any = None
    kind: str = "shared"
    reaches: tuple[str, ...] = ()
    off: tuple[Any, ...] = ()
    owner: str = "user"

    @property
    def allowed(self) -> dict[str, Any]:
        """The bounds of a number, or the choices, by name: `minimum`, `low` and `high`, or `choices`; else empty."""
        return getattr(self.check, "keywords", {})


VLLM = ("vllm",)
SCORE = ("score", *VLLM)
SETTINGS = {
    row.name: row
    for row in (
        Setting("block_size", integer(1), "the checkpoint's",
                "tokens denoised together; use the size trained with", kind="diffusion", reaches=SCORE),
        Setting("denoising_steps", integer(1), "`block_size`",
                "steps per block at most; fewer are faster and less exact", kind="diffusion", reaches=VLLM),
        Setting("remasking_strategy", choice(*REMASKING_RULES), "`low_confidence_dynamic`",
                "which positions commit at a step: every token more probable than the threshold, and `block_size / "
                "denoising_steps` a step at least; `low_confidence_static`: exactly those; `margin` ranks by the "
                "lead over the second token; `entropy_bounded` ([paper](https://arxiv.org/abs/2505.24857)), "
                "`factor` ([paper](https://arxiv.org/abs/2505.22618)) and `frechet` "
                "([paper](https://arxiv.org/abs/2606.02955)) bound what commits together",
                "low_confidence_dynamic", "diffusion", reaches=VLLM),
        Setting("confidence_threshold", number(0.0, 1.0), "0.9",
                "lower is faster: more tokens a step; the checkpoints' authors recommend 0.5 at block 16; for "
                "`margin` the lead", 0.9, "diffusion", reaches=VLLM),
        Setting("entropy_bound", number(0.0, math.inf), "0.1",
                "nats, for `entropy_bounded`", 0.1, "diffusion", reaches=VLLM),
        Setting("factor", number(0.0, math.inf, open_below=True), "1",
                "for the rule `factor`", 1.0, "diffusion", reaches=VLLM),
        Setting("frechet_bound", number(0.0, 1.0), "0",
                "for the rule `frechet`; higher commits less at a step", 0.0, "diffusion", reaches=VLLM),
        Setting("concurrent_blocks", integer(1), "1",
                "blocks of a response denoised together: what the rule finds sure enough in those further on commits "
                "ahead of their turn ([paper](https://arxiv.org/abs/2606.29215)); fewer forwards, and other tokens "
                "than one by one: for models trained for it", 1, "diffusion", off=(1,)),
        Setting("end_at_first_eos", choice(True, False), "`False`",
                "a response ends once everything up to its first EOS is decided: the same tokens, in fewer steps",
                False, "diffusion", reaches=VLLM),
        Setting("revision", choice(*REVISION_THRESHOLDS), "off",
                "`overwrite` or `remask` committed tokens of the block that a later step disagrees with; for models"
                " trained for it (`visible_weight` in [docs/training.md](docs/training.md)), others `overwrite` "
                "spoils", kind="diffusion"),
        Setting("revision_threshold", number(0.0, 1.0), "0.9, 0.1",
                "overwrite by what is more probable, remask what is less probable", kind="diffusion", reaches=VLLM),
        Setting("max_new_tokens", integer(1), "256",
                "response tokens at most, any number; a limit, as is the model's last position: a response ends with "
                "the last whole block before it", 256, reaches=VLLM),
        Setting("max_length", integer(1), "unset",
                "prompt and response tokens at most, where no `max_new_tokens` is stated beside it", reaches=VLLM),
        Setting("max_time", number(0.0, math.inf), "unset",
                "seconds after which a row ends with the block that it finishes next"),
        Setting("temperature", number(0.0, math.inf), "0, or 1 with `do_sample=True`",
                "0 is greedy; confidence stays the model's own probability", kind="sampling", reaches=VLLM),
        Setting("do_sample", choice(True, False), "unset",
                "`False` forces greedy decoding whatever the temperature", kind="sampling", reaches=VLLM),
        Setting("top_k", integer(0), "0, off",
                "sample among the most probable tokens", 0, "sampling", reaches=VLLM),
        Setting("top_p", number(0.0, 1.0, open_below=True), "1, off",
                "sample among the most probable tokens that have this probability together", 1.0, "sampling",
                reaches=VLLM),
        Setting("seed", check_seed, "none",
                "repeats a call that samples, whatever other calls do; so does the argument `generator`",
                kind="diffusion"),
        Setting("repetition_penalty", number(0.0, math.inf, open_below=True), "none",
                "as in transformers; counts the prompt and the committed tokens left of a position", off=(1.0,)),
        Setting("no_repeat_ngram_size", integer(0), "none",
                "no sequence of this number of tokens comes out twice, however many tokens commit together", off=(0,)),
        Setting("bad_words_ids", list_of(is_word, "non-empty lists of token ids"), "none",
                "sequences that never come out, however many tokens commit together"),
        Setting("suppress_tokens", list_of(is_id, "token ids"), "none",
                "tokens that never come out", off=([],)),
        Setting("sequence_bias", list_of(is_bias, "pairs of a list of token ids and a number"), "none",
                "what is added to the scores of sequences, which come out as if chosen from left to right; a token "
                "whose bias depends on an undecided one waits, and the leftmost commit in its stead", off=([],)),
        Setting("stop_strings", check_texts, "none",
                "end a response at the first of these texts, looked for on every prefix of a finished block, in "
                "order; needs `tokenizer=`", off=("", [])),
        Setting("eos_token_id", check_ids_of, "the checkpoint's",
                "ids that end a response, looked for alike", kind="token", reaches=VLLM),
        Setting("pad_token_id", integer(0), "the checkpoint's, or the first EOS",
                "fills up shorter rows", kind="token", reaches=VLLM),
        Setting("bos_token_id", check_ids_of, "the checkpoint's",
                "kept for other programs", kind="token", reaches=VLLM),
        Setting("mask_token_id", integer(0), "the checkpoint's, 151671",
                "stands for an undecided token", kind="diffusion", reaches=SCORE),
        Setting("num_return_sequences", integer(1), "1",
                "responses per prompt, which is encoded once for all", 1, owner="program", reaches=VLLM),
        Setting("return_dict_in_generate", choice(True, False), "`False`",
                "sequences, tokens per forward, forwards by kind, step counts, confidences, the cache", False,
                owner="program", reaches=VLLM),
        Setting("return_step_stats", choice(True, False), "`False`",
                "the reference's counts", False, "diffusion", owner="program", reaches=VLLM),
        Setting("output_history", choice(True, False), "`False`",
                "every step of every block", False, "diffusion", owner="program", reaches=VLLM),
        Setting("use_cache", choice(True), "`True`",
                "there is no other choice", reaches=VLLM),
        Setting("prefill_chunk_size", integer(1), "whole prompts",
                "tokens of a prompt encoded together, cut to whole blocks; bounds the memory of long prompts, costs"
                " a forward per chunk", reaches=VLLM),
        Setting("cache_implementation", choice("dynamic", "static"), "by the device",
                "`static`: compiled layers, and on a GPU recorded steps; `dynamic`: eager ones; by default the former"
                " on a GPU, the latter elsewhere", owner="server", reaches=VLLM),
        Setting("check_interval", integer(1), "1",
                "of earlier versions, without effect: the engine knows after each step who has ended",
                1, "diffusion", reaches=VLLM),
    )
}  # fmt: skip
FIELDS = tuple(SETTINGS)
DEFAULTS = {name: row.default for name, row in SETTINGS.items() if row.default is not None}
SAMPLING_FIELDS = tuple(name for name, row in SETTINGS.items() if row.kind == "sampling")
TOKEN_FIELDS = tuple(name for name, row in SETTINGS.items() if row.kind == "token")

# (name, value) stated by one source takes (name, value) of an earlier one back.
SUPERSEDES: tuple[tuple[str, Callable[[Any], bool], str, Callable[[Any], bool]], ...] = (
    ("max_length", lambda _: True, "max_new_tokens", lambda _: True),
    ("block_size", lambda _: True, "denoising_steps", lambda _: True),
    ("revision", lambda _: True, "revision_threshold", lambda _: True),
    (
        "temperature",
        lambda value: isinstance(value, int | float) and value > 0,
        "do_sample",
        lambda value: value is False,
    ),
    ("do_sample", lambda value: value is True, "temperature", lambda value: value == 0),
)


def settings_table() -> str:
    """The settings as the Markdown table of the manual."""
    rows = [f"| `{row.name}` | {row.shown} | {row.help} |" for row in SETTINGS.values()]
    return "\n".join(["| setting | default | what it does |", "|---|---|---|", *rows])


class BardVLGenerationConfig(SettingsFile):
    """Settings of block-diffusion decoding, saved in and loaded from `generation_config.json`.

    A field that is None is unset: `generate` then takes the default. Numbers, arrays and tensors of numpy, pandas and
    torch become Python's numbers and lists. `block_size` is never stored in the file: it is a fact of the weights.

    Args:
        The rows of `SETTINGS`; a table of them follows.

    Raises:
        ValueError: a value is out of range, or asks for something that block diffusion decoding does not do (beams,
            assisted decoding, constraints, ...). The message names field and value.
    """

    def __init__(self, **kwargs: Any):
        unknown = [name for name in kwargs if name not in SETTINGS and not name.startswith("_")]
        unknown = sorted(set(unknown) - set(plain_defaults()) - {"transformers_version"})
        if unknown:
            raise ValueError(f"unknown generation settings: {', '.join(unknown)}")
        for name, row in SETTINGS.items():
            if row.kind == "diffusion":
                setattr(self, name, kwargs.pop(name, None))
        self._known = False  # the parent validates before all fields are there
        super().__init__(**{name: value for name, value in kwargs.items() if value is not None})
        # transformers 4 has defaults where 5 has None: what nobody set is None here on both.
        for name, row in SETTINGS.items():
            if row.kind != "diffusion":
                setattr(self, name, kwargs.get(name))
        del self._known
        self.validate()
        if self.max_length is None:  # transformers 4 compares it with lengths
            self._fill("max_length", plain_fields()["max_length"])

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, which is stated then."""
        self._filled.pop(name, None)
        super().__setattr__(name, python_value(value) if name in SETTINGS else value)

    @property
    def _filled(self) -> dict[str, Any]:
        """Values that transformers reads or fills in, and nobody stated."""
        return self.__dict__.setdefault("_filled_in", {})

    def _fill(self, name: str, value: Any) -> None:
        setattr(self, name, value)
        self._filled[name] = value

    def update(self, defaults_only: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Set fields, or with `defaults_only` those that are unset, which then still count as unset.

        Returns:
            The arguments that are no fields.
        """
        if not defaults_only:
            settings = {name: value for name, value in kwargs.items() if name != "allow_custom_entries"}
            for name in superseded(self.explicit(), settings):
                setattr(self, name, None)
            return super().update(**kwargs)
        for name, value in kwargs.items():
            if hasattr(self, name) and getattr(self, name) is None:
                self._fill(name, value)
        return {name: value for name, value in kwargs.items() if not hasattr(self, name)}

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check every field; raise `ValueError` with the name and the value of the first that is wrong."""
        if "_known" in vars(self):
            return
        for name, value in self.explicit().items():
            SETTINGS[name].check(name, value)
        if self.block_size is not None and self.denoising_steps is not None:
            check_steps(self.denoising_steps, self.block_size)
        for name, value in self._unsupported().items():
            raise ValueError(f"`{name}={value!r}` is not supported by block-diffusion decoding")

    def explicit(self) -> dict[str, Any]:
        """The fields that are set, by name."""
        stated = {name: getattr(self, name, None) for name in FIELDS if name not in self._filled}
        return {name: value for name, value in stated.items() if value is not None}

    def _unsupported(self) -> dict[str, Any]:
        """Fields of other decoding that ask for something."""
        others = {name: getattr(self, name, None) for name in plain_defaults() if name not in SETTINGS}
        return {name: value for name, value in others.items() if asks_for_something(name, value)}

    def to_dict(self) -> dict[str, Any]:
        """Every field by name."""
        output = super().to_dict()
        output.pop("_filled_in", None)
        return {name: None if name in self._filled else value for name, value in output.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The stored settings: the rule and all set fields, except `block_size`, which config.json owns."""
        stored = {"remasking_strategy": DEFAULTS["remasking_strategy"], **self.explicit()}
        stored.pop("block_size", None)
        return {**stored, "transformers_version": self.to_dict()["transformers_version"]}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, without what `readable_settings` sets aside."""
        settings = readable_settings({**self.to_diff_dict(), **self._unsupported()}, f"saving to {save_directory}")
        super(BardVLGenerationConfig, type(self)(**settings)).save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; an error about what a file states names it."""
        try:
            return super().from_pretrained(pretrained_model_name, *args, **kwargs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"generation_config.json of {pretrained_model_name}: {error}") from error
        except OSError as error:
            if isinstance(error.__context__, ValueError):  # it is there, and no JSON
                raise ValueError(f"generation_config.json of {pretrained_model_name}: {error.__context__}") from error
            raise

    @classmethod
    def read_settings(cls, settings: dict[str, Any], json_file: Any) -> dict[str, Any]:
        """Read a file as `readable_settings` does."""
        if not isinstance(settings, dict):
            raise ValueError(f"it must hold an object, got {settings!r:.80}")
        if "remasking_strategy" not in settings:
            settings = drop_plain_defaults(settings)
        return readable_settings(settings, str(json_file))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read settings; in a dictionary without block-diffusion fields, values equal to plain defaults are unset."""
        if "remasking_strategy" not in config_dict:
            config_dict = drop_plain_defaults(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_plain(cls, config: Any) -> "BardVLGenerationConfig":
        """Convert a config of transformers' own class as `readable_settings` does."""
        return cls(**readable_settings(drop_plain_defaults(config.to_dict()), "the model's generation config"))

    @classmethod
    def from_model_config(cls, model_config: Any) -> "BardVLGenerationConfig":
        """Start from the token ids that a model config states."""
        text = model_config.get_text_config()
        ids = {name: getattr(text, name, None) for name in TOKEN_FIELDS}
        return cls(**readable_settings(ids, "the model's config"))


BardVLGenerationConfig.__doc__ = f"{BardVLGenerationConfig.__doc__}\n{settings_table()}\n"


@dataclass(frozen=True)
class DecodingSettings:
    """Every setting of one call of `generate`, resolved and checked against the model; `bound` is that of the rule."""

    block_size: int
    denoising_steps: int
    max_new_tokens: int
    remasking_strategy: str
    bound: float
    revision: Revision | None
    sampling: Sampling
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    concurrent_blocks: int
    end_at_first_eos: bool
    num_return_sequences: int
    prefill_chunk_size: int | None
    cache_implementation: str | None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.sampling.temperature != 0

    @property
    def remasks(self) -> bool:
        """Whether committed tokens may be masked again."""
        return self.revision is not None and self.revision.way == "remask"

    @property
    def overwrite_threshold(self) -> float | None:
        """The least probability of a token that replaces a committed one; None if committed tokens stay."""
        return None if self.revision is None or self.remasks else self.revision.threshold

    @classmethod
    def resolve(cls, config: BardVLGenerationConfig, model_config: Any, prompt_length: int) -> "DecodingSettings":
        """Fill what `config` leaves open: argument, generation config set in code, model config, default.

        Raises:
            ValueError: nothing states a block size, or a value does not fit the model.
        """
        block_size = resolve_block_size(config.block_size, model_config)
        denoising_steps = block_size if config.denoising_steps is None else config.denoising_steps
        check_steps(denoising_steps, block_size)
        max_new_tokens = resolve_length(config, prompt_length)
        mask_token_id = resolve_mask_token_id(config.mask_token_id, model_config)
        eos_token_ids, pad_token_id = resolve_ends(config, model_config, mask_token_id)
        rule, chunk = setting(config, "remasking_strategy"), config.prefill_chunk_size
        is_eager = getattr(config, "disable_compile", False)
        settings = cls(
            block_size=block_size,
            denoising_steps=denoising_steps,
            max_new_tokens=max_new_tokens,
            remasking_strategy=rule,
            bound=setting(config, REMASKING_RULES[rule].bound),
            revision=resolve_revision(config),
            sampling=resolve_sampling(config),
            mask_token_id=mask_token_id,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            concurrent_blocks=setting(config, "concurrent_blocks"),
            end_at_first_eos=setting(config, "end_at_first_eos"),
            num_return_sequences=setting(config, "num_return_sequences"),
            prefill_chunk_size=chunk and max(chunk // block_size, 1) * block_size,
            cache_implementation="dynamic" if is_eager else config.cache_implementation,
        )
        check_together(settings)
        # Recorded steps have room for all of them: no more than a response has.
        num_blocks = -(-max_new_tokens // block_size)
        return replace(settings, concurrent_blocks=min(settings.concurrent_blocks, num_blocks))


def resolve_block_size(block_size: Any, model_config: Any) -> int:
    """The block size stated by an argument, else by the model config; `ValueError` if neither does."""
    block_size = check_integer("block_size", python_value(block_size), minimum=1, optional=True)
    block_size = model_config.block_size if block_size is None else block_size
    if block_size is None:
        raise ValueError(
            "no `block_size`: neither the call nor the checkpoint's config.json states it. Pass `block_size=`; it is "
            "the number after B in the name of a published checkpoint, for instance 16 for Bard-VL-B16-Mask-4B-Instruct"
        )
    return block_size


def resolve_mask_token_id(mask_token_id: Any, model_config: Any) -> int:
    """The mask id stated by an argument, else by the model config; `ValueError` if the vocabulary lacks it."""
    mask_token_id = python_value(model_config.mask_token_id if mask_token_id is None else mask_token_id)
    vocab_size = model_config.get_text_config().vocab_size
    if check_integer("mask_token_id", mask_token_id, minimum=0) >= vocab_size:
        raise ValueError(f"`mask_token_id` = {mask_token_id} lies outside the vocabulary of {vocab_size} tokens")
    return mask_token_id


def resolve_length(config: BardVLGenerationConfig, prompt_length: int) -> int:
    """Response tokens at most; `ValueError` if the prompt leaves no room below `max_length`."""
    if config.max_new_tokens is not None or "max_length" not in config.explicit():
        return setting(config, "max_new_tokens")
    if config.max_length <= prompt_length:
        raise ValueError(f"`max_length` = {config.max_length} leaves no room after {prompt_length} prompt tokens")
    return config.max_length - prompt_length


def resolve_ends(config: BardVLGenerationConfig, model_config: Any, mask_token_id: int) -> tuple[tuple[int, ...], int]:
    """The ids that end a response and the one that pads; `ValueError` if one is the mask or outside the vocabulary."""
    vocab_size, eos = model_config.get_text_config().vocab_size, token_ids(config.eos_token_id)
    if config.eos_token_id is None and vocab_size > DEFAULT_EOS_TOKEN_ID:
        eos = (DEFAULT_EOS_TOKEN_ID,)
    pad = config.pad_token_id if config.pad_token_id is not None else (eos[0] if eos else 0)
    for name, token_id in [("eos_token_id", token_id) for token_id in eos] + [("pad_token_id", pad)]:
        if token_id >= vocab_size:
            raise ValueError(f"`{name}` = {token_id} lies outside the vocabulary of {vocab_size} tokens")
        if token_id == mask_token_id:
            raise ValueError(f"`{name}` = {token_id} is the mask token")
    return eos, pad


def resolve_revision(config: BardVLGenerationConfig) -> Revision | None:
    """How tokens are revised; None where they stay."""
    if config.revision is None:
        return None
    threshold = config.revision_threshold
    return Revision(config.revision, REVISION_THRESHOLDS[config.revision] if threshold is None else threshold)


def resolve_sampling(config: BardVLGenerationConfig) -> Sampling:
    """How tokens are chosen: greedily unless a temperature above 0, or `do_sample=True`, asks for samples."""
    temperature = config.temperature
    if temperature is None:
        temperature = 1.0 if config.do_sample else 0.0
    if temperature == 0 or config.do_sample is False:
        return GREEDY
    return Sampling(temperature, setting(config, "top_k"), setting(config, "top_p"))


def check_steps(denoising_steps: int, block_size: int) -> None:
    """Raise `ValueError` if there are more steps than tokens in a block."""
    if denoising_steps > block_size:
        raise ValueError(f"`denoising_steps` must be between 1 and `block_size` = {block_size}, got {denoising_steps}")


def check_together(settings: DecodingSettings) -> None:
    """Raise `ValueError` for settings that say nothing together, or change what the other promises."""
    several, early = settings.concurrent_blocks > 1, settings.end_at_first_eos
    if settings.revision is not None and (several or early):
        stated = f"concurrent_blocks={settings.concurrent_blocks}" if several else f"end_at_first_eos={early}"
        raise ValueError(f"`{stated}` cannot be combined with `revision={settings.revision.way!r}`")
    if several and settings.remasking_strategy == "low_confidence_static":
        raise ValueError(
            "`concurrent_blocks` needs a rule that commits what is sure, not `low_confidence_static`: it commits what "
            "is due, and further blocks are not"
        )


def setting(config: BardVLGenerationConfig, name: str) -> Any:
    """A field's value, or its default where it is unset."""
    value = getattr(config, name)
    return DEFAULTS[name] if value is None else value


def token_ids(value: Any) -> tuple[int, ...]:
    """One id, a list or tensor of ids, or None as a tuple of ids."""
    value = python_value(value)
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def python_value(value: Any) -> Any:
    """Numbers and lists of Python's own for those of numpy, pandas and torch, tuples and sets; a dict as pairs."""
    if callable(getattr(value, "tolist", None)):
        value = value.tolist()
    if isinstance(value, dict):
        value = list(value.items())
    return (
        [python_value(part) for part in value] if isinstance(value, list | tuple | set | frozenset | range) else value
    )


def merged_settings(model: dict[str, Any], config: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings of the model, overridden by those of a call, by name; None in `arguments` unsets a setting.

    Args:
        model: settings of the model.
        config: of the call's config, which may be a changed copy of the model's: only what differs is new.
        arguments: of the call.
    """
    new = {name: value for name, value in config.items() if name not in model or model[name] != value}
    dropped = superseded(model, new)
    merged = {name: value for name, value in {**model, **config}.items() if name not in dropped}
    dropped = superseded(merged, arguments)
    return {**{name: value for name, value in merged.items() if name not in dropped}, **arguments}


def superseded(earlier: dict[str, Any], stated: dict[str, Any]) -> list[str]:
    """Names of `earlier` settings that a later source takes back by what it `stated`, and does not state again."""

    def holds(source: dict[str, Any], name: str, condition: Callable[[Any], bool]) -> bool:
        value = python_value(source.get(name))
        return value is not None and condition(value)

    return [
        other
        for name, condition, other, other_condition in SUPERSEDES
        if holds(stated, name, condition) and other not in stated and holds(earlier, other, other_condition)
    ]


def readable_settings(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The usable part of settings that were not made for a call: from a file, or set in code for training.

    Left-overs of other decoding are set aside, with one warning: unknown fields, features that block diffusion lacks,
    and values that only other decoding knows. Settings that name no rule of block diffusion were written for
    autoregressive decoding: of those sampling is not read, as the published checkpoints are meant to decode greedily,
    and nothing in them is an error.
    """
    is_own = bool(settings.get("remasking_strategy"))
    unread = set() if is_own else {*SAMPLING_FIELDS, "repetition_penalty"}
    kept, aside = {}, {}
    for name, value in settings.items():
        if name == "bad_words_ids" and not value:  # which `generate` refuses of a call, as transformers does
            continue
        if name == "transformers_version" or (name in SETTINGS and value is None):
            kept[name] = value
        elif name in SETTINGS and name not in unread:
            row, value = SETTINGS[name], python_value(value)
            foreign = row.kind == "token" or name in ("use_cache", "cache_implementation") or not is_own
            if row.kind != "diffusion" and foreign and not passes(row, value):
                aside[name] = value
            else:
                kept[name] = value
        elif name in plain_defaults() and name not in SETTINGS and asks_for_something(name, value):
            aside[name] = value
    if aside:
        listed = ", ".join(f"`{name}={value!r}`" for name, value in aside.items())
        logger.warning(f"{where}: block-diffusion decoding has no use for {listed}, set aside")
    return kept


def passes(row: Setting, value: Any) -> bool:
    """Whether a value passes the row's check."""
    try:
        row.check(row.name, value)
    except ValueError:
        return False
    return True


def asks_for_something(name: str, value: Any) -> bool:
    """Whether a field of a plain `GenerationConfig` has an effect by this value."""
    return value not in (None, False, *plain_defaults()[name], *NEUTRAL.get(name, ()))


def drop_plain_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields that a plain config states: without None, private entries, and values equal to its own defaults.

    Under `do_sample=True`, and for what is no setting of sampling, a value is stated even where it is the one that
    transformers 5 takes for None.
    """
    plain, applied = plain_fields(), applied_defaults()
    samples = settings.get("do_sample") is True

    def is_stated(name: str, value: Any) -> bool:
        if value is None or name.startswith("_") or (name in plain and value == plain[name]):
            return False
        return samples or name not in SAMPLING_FIELDS or value != applied.get(name)

    return {name: value for name, value in settings.items() if is_stated(name, value)}


# Values of other settings that are heeded, or change nothing here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "disable_compile": (True,),
    "guidance_scale": (1,),
    "begin_suppress_tokens": ([],),
}
