"""What callers plug into the decoding loop: processors, criteria, streamers, generators; checked before any compute."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import (
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .generation_config_bard_vl import BardVLGenerationConfig, DecodingSettings, check_seed, python_value
from .processors_bard_vl import TokenProcessors


@dataclass
class DecodingHooks:
    """The caller's parts of the loop, and the processors that the settings name."""

    own_processors: TokenProcessors | None  # of the settings, on the device
    processors: LogitsProcessorList  # the caller's, on the host
    criteria: StoppingCriteriaList
    streamer: Any
    generator: torch.Generator | None
    keep_history: bool
    deadline: float  # in the seconds of time.monotonic

    @property
    def watch_blocks(self) -> bool:
        """Whether something looks at finished blocks on the host."""
        return bool(self.criteria) or self.streamer is not None or self.deadline < math.inf

    @property
    def any(self) -> bool:
        """Whether something looks at the steps on the host."""
        return self.watch_blocks or bool(self.processors) or self.keep_history


def check_streamer(streamer: Any, num_rows: int) -> None:
    """Raise `ValueError` unless `streamer` is None, or has `put` and `end` and there is one row to follow."""
    if streamer is None:
        return
    if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise ValueError(f"`streamer` must have the methods `put` and `end`, got {streamer!r}")
    if num_rows > 1:
        raise ValueError(f"a streamer follows one row, this batch has {num_rows}")


def check_callables(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is None or a list of callables."""
    if value is not None and not (isinstance(value, list | tuple) and all(map(callable, value))):
        hint = f": give a list, `{name}=[...]`" if callable(value) else ""
        raise ValueError(f"`{name}` must be a list of callables, got {value!r}{hint}")


def check_banned_tokens(config: BardVLGenerationConfig, settings: DecodingSettings, vocab_size: int) -> None:
    """Raise `ValueError` if an id of a setting that bans or favours tokens is unknown, or none is left to choose."""
    suppressed, words = config.suppress_tokens or [], config.bad_words_ids or []
    biased = [ids for ids, _ in config.sequence_bias or []]
    for name, given in (("suppress_tokens", [suppressed]), ("bad_words_ids", words), ("sequence_bias", biased)):
        largest = max((token_id for ids in given for token_id in ids), default=0)
        if largest >= vocab_size:
            raise ValueError(f"`{name}`: {largest} lies outside the vocabulary of {vocab_size} tokens")
    if config.bad_words_ids is not None and not words:
        raise ValueError(f"`bad_words_ids` must be a non-empty list of lists of token ids, got {words!r}")
    # A bad word that is an EOS bans nothing, as in transformers.
    single = {word[0] for word in words if len(word) == 1} - set(settings.eos_token_ids)
    if len({*suppressed, *single, settings.mask_token_id}) == vocab_size:
        raise ValueError("`suppress_tokens` and `bad_words_ids` leave no token to choose")


def build_stopping_criteria(
    config: BardVLGenerationConfig, extra: list[Callable] | None, tokenizer: Any
) -> StoppingCriteriaList:
    """transformers' criteria for the settings that name one, then the caller's."""
    check_callables("stopping_criteria", extra)
    criteria = StoppingCriteriaList()
    if config.stop_strings:
        if tokenizer is None:
            raise ValueError(f"`stop_strings` = {config.stop_strings!r} needs `tokenizer=` in the call of `generate`")
        if not hasattr(tokenizer, "get_vocab"):
            given, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", None)
            if not hasattr(tokenizer, "get_vocab"):
                raise ValueError(f"`tokenizer` must be a tokenizer or a processor, got {type(given).__name__}")
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings))
    criteria.extend(extra or [])
    return criteria


def build_generator(
    generator: torch.Generator | None, seed: int | None, device: torch.device
) -> torch.Generator | None:
    """The caller's generator, or one on `device` with the seed, or None; `ValueError` if they are wrong."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"`generator` must be a torch.Generator, got {type(generator).__name__}")
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("give `generator` or `seed`, not both")
    check_seed("seed", python_value(seed))
    return torch.Generator(device=device).manual_seed(python_value(seed))


__all__ = [
    "DecodingHooks",
    "build_generator",
    "build_stopping_criteria",
    "check_banned_tokens",
    "check_callables",
    "check_streamer",
]
