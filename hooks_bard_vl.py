"""Hooks of callers in the decoding loop: processors, criteria, streamers, generators; checked before any compute."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .forms_bard_vl import Form
from .generation_config_bard_vl import BardVLGenerationConfig, DecodingSettings, check_seed, python_value, setting
from .inputs_bard_vl import Prompt
from .processors_bard_vl import TokenProcessors, build_processors
from .spelling_bard_vl import spelling_of
from .structured_bard_vl import BlockForm, build_forms


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
    form: BlockForm | None = None  # that the answers must have

    @property
    def may_stop(self) -> bool:
        """Whether a finished block may end a row for something beside its tokens."""
        return bool(self.criteria) or self.deadline < math.inf

    @property
    def watch_blocks(self) -> bool:
        """Whether something looks at finished blocks on the host."""
        return self.may_stop or self.streamer is not None

    @property
    def any(self) -> bool:
        """Whether something looks at the steps on the host."""
        return self.watch_blocks or bool(self.processors) or self.keep_history


def build_hooks(
    config: BardVLGenerationConfig,
    settings: DecodingSettings,
    prompt: Prompt,
    limits: list[int],
    vocab_size: int,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    streamer: Any,
    generator: Any,
    seed: int | None,
    tokenizer: Any,
    structured: Any,
) -> DecodingHooks:
    """The hooks of a call of `generate`, by its arguments of these names; `take_over` may change `config`.

    Raises:
        ValueError: one of them is wrong, or cannot be heeded beside another or beside `concurrent_blocks`.
    """
    device = prompt.input_ids.device
    check_streamer(streamer, len(limits) * settings.num_return_sequences)
    check_callables("logits_processor", logits_processor)
    processors = LogitsProcessorList(logits_processor or [])
    if processors and settings.block_size > 1:
        processors = take_over(config, processors)
    check_banned_tokens(config, settings, vocab_size)
    longest = max(prompt.host_lengths) + settings.max_new_tokens + settings.block_size
    own_processors = build_processors(config, settings, vocab_size, device, longest)
    form = build_form(structured, tokenizer, settings, limits, vocab_size, device)
    check_alone(form, own_processors)
    if settings.concurrent_blocks > 1 and (own_processors or processors or form):
        what = "`structured`" if form else "`logits_processor`" if processors else "settings that change scores"
        raise ValueError(f"`concurrent_blocks={settings.concurrent_blocks}` cannot be combined with {what}")
    criteria = build_stopping_criteria(config, stopping_criteria, tokenizer)
    if seed is None and generator is None:
        seed = config.seed
    return DecodingHooks(
        own_processors=own_processors,
        processors=processors,
        criteria=criteria,
        streamer=streamer,
        generator=build_generator(generator, seed, device),
        keep_history=setting(config, "output_history"),
        deadline=math.inf if config.max_time is None else time.monotonic() + config.max_time,
        form=form,
    )


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


def take_over(config: BardVLGenerationConfig, processors: list[Callable]) -> LogitsProcessorList:
    """Say in a call's `config` what transformers' own processors of several tokens do; the others are left.

    A processor of the caller's is shown committed tokens. Where several commit together it cannot see the phrase that
    they form, the settings can.

    Raises:
        ValueError: no setting says what one of them does.
    """
    others = LogitsProcessorList()
    words, suppressed = list(config.bad_words_ids or []), list(config.suppress_tokens or [])
    biases = {tuple(ids): bias for ids, bias in config.sequence_bias or []}
    sizes = [config.no_repeat_ngram_size] if config.no_repeat_ngram_size else []
    processor: Any
    for processor in processors:
        if type(processor) is NoRepeatNGramLogitsProcessor:
            sizes.append(processor.ngram_size)  # what repeats none of the shorter repeats none of the longer
        elif type(processor) is NoBadWordsLogitsProcessor:
            banned = [list(map(int, ids)) for ids in processor.sequence_bias]
            words += [ids for ids in banned if len(ids) > 1]
            suppressed += [ids[0] for ids in banned if len(ids) == 1]  # an EOS too, if it is still among them
        elif type(processor) is SequenceBiasLogitsProcessor and not others:
            for ids, bias in processor.sequence_bias.items():
                biases[ids] = biases.get(ids, 0.0) + float(bias)
        elif type(processor) in (
            SequenceBiasLogitsProcessor,
            EncoderNoRepeatNGramLogitsProcessor,
            PrefixConstrainedLogitsProcessor,
        ):
            hint = ": put it first" if type(processor) is SequenceBiasLogitsProcessor else ""
            raise ValueError(
                f"`logits_processor` holds a {type(processor).__name__}, which cannot hold where several tokens commit "
                f"together{hint}"
            )
        else:
            others.append(processor)
    stated: dict[str, Any] = {"bad_words_ids": words or None, "suppress_tokens": suppressed or None}
    stated |= {"sequence_bias": biases or None, "no_repeat_ngram_size": min(sizes, default=None)}
    for name, value in stated.items():
        if value is not None:
            setattr(config, name, value)
    config.validate()
    return others


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
        tokenizer = find_tokenizer(tokenizer, f"`stop_strings` = {config.stop_strings!r}")
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings))
    criteria.extend(extra or [])
    return criteria


def find_tokenizer(given: Any, what: str) -> Any:
    """The tokenizer of a processor, or itself; `ValueError` says that `what` needs one."""
    if given is None:
        raise ValueError(f"{what} needs `tokenizer=` in the call of `generate`")
    tokenizer = given if hasattr(given, "get_vocab") else getattr(given, "tokenizer", None)
    if not hasattr(tokenizer, "get_vocab"):
        raise ValueError(f"`tokenizer` must be a tokenizer or a processor, got {type(given).__name__}")
    return tokenizer


def build_form(
    structured: Any,
    tokenizer: Any,
    settings: DecodingSettings,
    limits: list[int],
    vocab_size: int,
    device: torch.device,
) -> BlockForm | None:
    """The forms that a call asks for, one for all rows or a list with one for each, on `device`; None for none.

    Raises:
        ValueError: a form is wrong, cannot be completed within a row's limit, or nothing could end it.
    """
    if structured is None:
        return None
    given = list(structured) if isinstance(structured, list | tuple) else [structured] * len(limits)
    if len(given) != len(limits):
        raise ValueError(f"`structured` has {len(given)} forms for {len(limits)} prompts: give one, or one a prompt")
    forms = [Form.read(form) for form in given]
    if not settings.eos_token_ids:
        raise ValueError("`structured` needs an `eos_token_id`, which ends an answer")
    tokenizer = find_tokenizer(tokenizer, "`structured`")
    form = build_forms(forms, spelling_of(tokenizer, vocab_size, settings.eos_token_ids[0]), device)
    form.check_limits(limits)
    return form


def check_alone(form: BlockForm | None, processors: TokenProcessors | None) -> None:
    """Raise `ValueError` if processors that look at the tokens beside a choice meet a form."""
    if form is not None and processors is not None and processors.looks_beside:
        raise ValueError(
            "`structured` cannot be combined with `no_repeat_ngram_size`, nor with `bad_words_ids` or `sequence_bias` "
            "of several tokens: what they allow depends on tokens that are chosen at the same time"
        )


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
