"""Block-diffusion generation: `generate`, `score`, and what they return."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.generation import GenerationConfig

from .cache_bard_vl import BardVLCache, WeightsPrint
from .compat_bard_vl import CacheOutput, PortableGeneration, attention_of, one_cache, unpack_weights
from .configuration_bard_vl import check_integer, warn_if_seed
from .engine_bard_vl import DenoisingStep, Engine, SlotEncoder
from .generation_config_bard_vl import (
    FIELDS,
    BardVLGenerationConfig,
    DecodingSettings,
    drop_plain_defaults,
    merged_settings,
    python_value,
    resolve_mask_token_id,
    setting,
)
from .hooks_bard_vl import build_hooks
from .inputs_bard_vl import (
    VISUAL_INPUTS,
    Prompt,
    asks_for_nothing,
    check_ids,
    check_left_alone,
    check_length,
    check_prompt,
    check_visual_inputs,
    grids_of,
    response_limits,
    visual_tensor,
)
from .masking_bard_vl import check_attention_implementation
from .recording_bard_vl import release_idle
from .rows_bard_vl import Rows

MODEL_INPUTS = (*VISUAL_INPUTS, "input_ids", "attention_mask")


@dataclass
class BardVLGenerationOutput(CacheOutput):
    """The output of `generate` with `return_dict_in_generate=True`. Rows are those of `sequences`.

    Attributes:
        sequences: (rows, prompt + response) ids, padded left of the prompt as given and right of the response.
        tokens_per_forward: (rows,) response tokens, up to and including the first EOS, over the forwards that the row
            took part in, whatever they were for.
        cache: keys and values, for the next turn; `past_key_values` is the same.
        block_step_counts: (rows, blocks) denoising steps of each block, 0 where a row has no such block, or where its
            form dictates a whole one.
        num_forwards: forwards of the language model by kind: `prefill` (chunks but the last), `prefill+denoise`,
            `denoise`, `commit+denoise`, `overrun` (recorded steps: one may be launched before the host has read that
            all rows had ended). A forward counts once, however many rows took part. None commits a block alone: a
            finished block shares a forward with the next one, and the last block is never encoded again.
        num_encoded_tokens: (rows,) prompt tokens that this call encoded; the others came from `past_key_values`.
        confidences: (rows, response) probability that the model gave each token when it committed, 0 for padding.
        history: per row, the denoising steps in order; None unless `output_history=True`.
        dictated: (rows, response) bool, tokens to which the form left no alternative; None without `structured`.
        num_tokens: (rows,) response tokens, an EOS included; what follows them is padding.
    """

    sequences: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    cache: BardVLCache | None = None
    block_step_counts: torch.Tensor | None = None
    num_forwards: dict[str, int] | None = None
    num_encoded_tokens: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    history: list[list[DenoisingStep]] | None = None
    dictated: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None


@dataclass
class Call:
    """The arguments of a call, read and checked.

    Attributes:
        config: the settings that model and call state.
        settings: resolved; `max_new_tokens` is that of the row with the most room.
        input_ids: (batch, length) as given, padded on the left.
        prompt: realigned.
        limits: most response tokens of each row.
    """

    config: BardVLGenerationConfig
    settings: DecodingSettings
    input_ids: torch.Tensor
    prompt: Prompt
    limits: list[int]


class BardVLGenerationMixin(PortableGeneration):
    """`generate` and `score` for a Bard-VL model."""

    generation_config_class = BardVLGenerationConfig
    # Provided by the model class.
    config: Any
    model: Any
    lm_head: Any
    get_position_ids: Callable[..., torch.Tensor]

    @property
    def generation_config(self) -> BardVLGenerationConfig | None:
        """Defaults of `generate`; whatever transformers assigns becomes a `BardVLGenerationConfig`."""
        return self.__dict__.get("_generation_config")

    @generation_config.setter
    def generation_config(self, config: GenerationConfig | None) -> None:
        if config is not None and not isinstance(config, BardVLGenerationConfig):
            config = BardVLGenerationConfig.from_plain(config)
        self.__dict__["_generation_config"] = config

    @classmethod
    def read_generation_config(cls, name: Any, **where: Any) -> BardVLGenerationConfig | None:
        """The settings of a folder's or repository's `generation_config.json`, None if there is no such file."""
        with contextlib.suppress(OSError):
            return BardVLGenerationConfig.from_pretrained(name, **where)
        return None

    def stored_settings(self) -> BardVLGenerationConfig:
        """A copy of the model's own settings."""
        return copy.deepcopy(self.generation_config or BardVLGenerationConfig())

    @torch.no_grad()
    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: list[Callable] | None = None,
        stopping_criteria: list[Callable] | None = None,
        streamer: Any = None,
        past_key_values: BardVLCache | None = None,
        cache: BardVLCache | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
        structured: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Write responses block by block (arXiv 2604.16514, section 3; the loop is that of its decoder).

        1. Read the settings and check the prompts; nothing is computed before.
        2. Realign the rows to column 0, lay out their blocks, find what a passed cache already holds.
        3. Encode the images, then the prompts together with the first step of the first blocks.
        4. Until every row has ended:
            a. choose a token for every position of each row's block, with its confidence;
            b. commit what the remasking rule says;
            c. where a block is finished, look for an end on each of its prefixes: EOS, stop string, criterion, length;
            d. encode the next step: unfinished blocks again, finished ones together with the next block's first step.
        5. Cut, pad and return.

        Args:
            inputs: the processor's output, a mapping; then the response ids alone are returned, as by the reference.
                Or the ids (batch, length), which may also be given as `input_ids=`, with `attention_mask`,
                `pixel_values`, `image_grid_thw`, `pixel_values_videos`, `video_grid_thw` beside it; then prompt and
                response are returned. Padding is on the left.
            generation_config: settings on top of the model's; keyword arguments are on top of both. See
                `BardVLGenerationConfig` for their names.
            logits_processor: each is called for every undecided position with (prompt and committed tokens left of it
                (1, n), scores (1, vocabulary)) before choice and confidence. It does not see tokens that commit in the
                same step: transformers' processors of several tokens (bad words, n-grams, biases) become settings.
            stopping_criteria: each is called with (prompt and response prefix (1, n), None) for every prefix of a
                finished block, in order.
            streamer: gets the prompt (1, length), then `put` with the ids (n,) of each finished block, and
                `put_draft(value=ids)` with those of the block (1, block size) after each step if it has that method;
                undecided tokens hold the mask id. One row only.
            past_key_values, cache: two names of the cache of an earlier call whose prompts begin like these; it is
                updated in place. What was computed in another dtype, on another device, or under another inference
                mode is encoded again.
            generator: source of randomness on the model's device; or `seed`.
            tokenizer: needed with `stop_strings` and `structured`; a processor will do.
            structured: the form that every answer has, or a list with one for each prompt: a mapping with one of
                `choices`, `regex`, `json_schema` and `template`. See docs/structured.md.

        Returns:
            Prompt and response ids (rows, length), or the response ids alone for a mapping, followed by history and
            statistics where `output_history` and `return_step_stats` ask for them; or, with
            `return_dict_in_generate=True`, a `BardVLGenerationOutput`. Nothing but padding follows an EOS.

        Raises:
            ValueError: a prompt or a setting is wrong, or not supported; raised before anything is computed.
            torch.OutOfMemoryError: the device has too little memory; the message says what takes less.
        """
        # 1. Settings and checks
        cache, num_layers = one_cache(past_key_values, cache), self.config.text_config.num_hidden_layers
        call = self.read_call(inputs, generation_config, kwargs)
        settings, prompt, from_mapping = call.settings, call.prompt, isinstance(inputs, Mapping)
        return_dict = setting(call.config, "return_dict_in_generate")
        for name in ("output_history", "return_step_stats"):
            if setting(call.config, name) and not (return_dict or from_mapping):
                raise ValueError(f"`{name}=True` needs `return_dict_in_generate=True`, or the inputs as a mapping")
        check_cache(cache, num_layers)
        warn_if_seed(self.config)
        hooks = build_hooks(
            call.config,
            settings,
            prompt,
            call.limits,
            self.config.get_text_config().vocab_size,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            generator=generator,
            seed=seed,
            tokenizer=tokenizer,
            structured=structured,
        )
        unpack_weights(self)

        # 2. Layout and reuse
        is_returned = return_dict or cache is not None
        cache = BardVLCache(num_layers) if cache is None else cache
        contents, scheme = self._cache_claims(call, is_returned)
        reused = cache.shared_prefix(contents, scheme)

        # 3. and 4. Decode
        with memory_advice(self, prompt, settings):
            if streamer is not None:
                streamer.put(call.input_ids.cpu())
            engine = Engine(self, prompt, call.limits, settings, cache, hooks)
            with cache.generation(contents, scheme):
                engine.run(reused)
                if is_returned:
                    cache.contents = engine.encoded_contents(contents)
        if streamer is not None:
            streamer.end()

        # 5. Output
        responses, confidences = engine.responses()
        prompts = call.input_ids.repeat_interleave(settings.num_return_sequences, dim=0)
        sequences = torch.cat([prompts, responses], dim=1)
        if return_dict:
            return output_of(engine, sequences, confidences, reused)
        return with_extras(engine, responses, call.config) if from_mapping else sequences

    def warm_up(self, num_rows: int, prompt_length: int, **settings: Any) -> None:
        """Compile, and on a GPU record, what `generate` runs with `cache_implementation="static"`, ahead of its use.

        Args:
            num_rows: prompts of a batch, times `num_return_sequences`.
            prompt_length: tokens of the longest prompt.
            settings: those of the calls to come, as far as they differ from the model's own. What is compiled serves
                all lengths; a recording serves calls whose columns round up to the same multiple of 256.
        """
        num_rows = check_integer("num_rows", python_value(num_rows), minimum=1)
        prompt_length = check_integer("prompt_length", python_value(prompt_length), minimum=1)
        mask_token_id = resolve_mask_token_id(settings.get("mask_token_id"), self.config)
        prompts = torch.full((num_rows, prompt_length), int(mask_token_id == 0), device=self.lm_head.weight.device)
        self.generate(prompts, **{"cache_implementation": "static", "eos_token_id": [], **settings})

    @torch.no_grad()
    def score(
        self,
        inputs: Mapping[str, Any],
        answers: torch.Tensor,
        block_size: int | None = None,
        mask_token_id: int | None = None,
        positions_per_forward: int = 64,
    ) -> torch.Tensor:
        """Pseudo-log-likelihood of given answers, token by token, for multiple-choice evaluation.

        Each answer token is masked alone and predicted from the prompt, the answer's earlier blocks and the other
        tokens of its block (Salazar et al. 2020, arXiv 1910.14659, under block-causal attention); positions of the
        last block behind the answer hold the mask token, as they may in decoding.

        Args:
            inputs: the processor's output for one prompt, which is encoded once for all answers, or for one prompt an
                answer.
            answers: (answers, length) ids, padded with -100 on the right.
            block_size, mask_token_id: default to the config's.
            positions_per_forward: answer tokens scored together.

        Returns:
            (answers, length) log-probabilities in float32, 0 for padding. Their sum over the last axis is the score.

        Raises:
            ValueError: prompts or answers are wrong, their numbers do not match, or an argument is out of range.
        """
        # 1. Checks
        if not isinstance(inputs, Mapping):
            raise ValueError(f"`inputs` must be the processor's output, a mapping, got {type(inputs).__name__}")
        positions_per_forward = check_integer("positions_per_forward", python_value(positions_per_forward), minimum=1)
        stated = {"block_size": block_size, "mask_token_id": mask_token_id, "max_new_tokens": 1}
        call = self.read_call(inputs, None, {name: value for name, value in stated.items() if value is not None})
        input_ids, prompt = call.input_ids, call.prompt
        block_size, mask_token_id = call.settings.block_size, call.settings.mask_token_id
        check_answers(self.config, answers, len(input_ids), mask_token_id)
        num_columns = -(-answers.shape[1] // block_size) * block_size
        check_length(self.config, prompt, answers.shape[1], block_size)
        unpack_weights(self)

        # 2. Encode every prompt once, then the answers without masks: what later blocks see
        answers = answers.to(input_ids.device).long()
        room = max(prompt.host_lengths) + num_columns + block_size
        rows = Rows.lay_out(prompt, [num_columns] * len(input_ids), block_size, mask_token_id, room)
        cache = BardVLCache(self.config.text_config.num_hidden_layers)
        with cache.generation([torch.empty(0)] * len(input_ids), self._cache_scheme(block_size, input_ids.device)):
            encoder = SlotEncoder(self, rows, cache, block_size)
            encoder.encode_prompts(prompt, 0, 0)
            lengths = prompt.host_lengths
            if len(answers) > len(input_ids):
                cache.repeat_rows(len(answers))
                encoder.repeat_rows(len(answers))
                lengths = lengths * len(answers)
            number = torch.arange(len(answers), device=input_ids.device)[:, None]
            columns = encoder.rows.length[:-1, None] + torch.arange(answers.shape[1], device=input_ids.device)
            encoder.rows.ids[number, columns] = answers.masked_fill(answers < 0, mask_token_id)
            encoder.encode_spans([(row, n, n, n + num_columns) for row, n in enumerate(lengths)])

            # 3. Mask the answer's tokens one at a time, a chunk of masked copies of blocks a forward
            scores = []
            for chunk in torch.arange(answers.shape[1], device=input_ids.device).split(positions_per_forward):
                hidden = encoder.encode_masked_copies(chunk, block_size, mask_token_id)
                log_probs = self.lm_head(hidden).float().log_softmax(-1).to(answers.device)
                targets = answers[:, chunk].clamp(min=0)
                scores.append(log_probs.gather(-1, targets[..., None])[..., 0])
        return torch.cat(scores, dim=1).masked_fill(answers < 0, 0.0)

    def read_call(
        self, inputs: Any, generation_config: GenerationConfig | None, arguments: Mapping[str, Any], warn: bool = True
    ) -> Call:
        """Read and check what a call of `generate` asks for; nothing is computed.

        Args:
            inputs, generation_config: as of `generate`.
            arguments: its keyword arguments, settings and inputs.
            warn: whether to say that a stated length passes the model's positions.

        Raises:
            ValueError: a prompt or a setting is wrong, or not supported.
        """
        check_left_alone(self)
        check_attention_implementation(attention_of(self.config.text_config))
        given = dict(inputs) if isinstance(inputs, Mapping) else {} if inputs is None else {"input_ids": inputs}
        twice = sorted(given.keys() & arguments.keys() & {*MODEL_INPUTS})
        if twice:
            raise ValueError(f"`{twice[0]}` is given twice")
        named = {name: value for name, value in arguments.items() if name in MODEL_INPUTS}
        config = self.merge_settings(
            generation_config, {name: arguments[name] for name in arguments if name not in named}
        )
        input_ids, attention_mask, visual_inputs = split_inputs({**given, **named})
        settings = DecodingSettings.resolve(config, self.config, input_ids.shape[-1])
        attention_mask = check_prompt(self.config, input_ids, attention_mask, settings.mask_token_id)
        check_visual_inputs(self.config, input_ids, **visual_inputs)
        positions = self.get_position_ids(input_ids, attention_mask, **grids_of(visual_inputs))[1:]
        prompt = Prompt.realign(input_ids, attention_mask, positions, visual_inputs)
        is_stated = warn and bool({"max_new_tokens", "max_length"} & config.explicit().keys())
        limits = response_limits(self.config, prompt, settings.max_new_tokens, settings.block_size, is_stated)
        return Call(config, replace(settings, max_new_tokens=max(limits)), input_ids, prompt, limits)

    def merge_settings(
        self, generation_config: GenerationConfig | None, arguments: Mapping[str, Any]
    ) -> BardVLGenerationConfig:
        """The model's settings, those of a config over them, and `arguments` over both.

        A keyword argument overrides others even with None, which unsets a field; one that is no setting and asks for
        nothing is left out.
        """
        # The class lets such names through, for transformers alone.
        private = sorted(name for name in arguments if name.startswith("_"))
        if private:
            raise ValueError(f"unknown generation settings: {', '.join(private)}")
        settings = {
            name: value for name, value in arguments.items() if name in FIELDS or not asks_for_nothing(name, value)
        }
        merged = merged_settings(_explicit(self.generation_config), _explicit(generation_config), settings)
        # As in the reference, an explicit None takes the value of the steps, where the checkpoint states no size.
        if "block_size" in settings and merged["block_size"] is None and self.config.block_size is None:
            merged["block_size"] = merged.get("denoising_steps")
        return BardVLGenerationConfig(**merged)

    def _cache_claims(self, call: Call, is_returned: bool) -> tuple[list[torch.Tensor], tuple]:
        """The tokens and pictures in each row of a cache, and its scheme; a cache that nobody gets claims nothing."""
        prompt = call.prompt
        scheme = self._cache_scheme(call.settings.block_size, call.input_ids.device)
        if is_returned:
            return prompt.contents(self.config), (*scheme, WeightsPrint(self))
        return [prompt.input_ids[:0, 0].cpu()] * len(call.input_ids), scheme

    def _cache_scheme(self, block_size: int, device: torch.device) -> tuple:
        """The conditions under which this call computes keys and values; it reuses only those of equal conditions."""
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        inference = torch.is_inference_mode_enabled()
        return (block_size, self.model.get_input_embeddings().weight.dtype, device, autocast, inference)


def check_cache(cache: Any, num_layers: int) -> None:
    """Raise `ValueError` unless `cache` is None or what `generate` returned for a model of as many layers."""
    if cache is None:
        return
    if not hasattr(cache, "shared_prefix"):
        raise ValueError(f"`past_key_values` must be a cache that `generate` returned, got {type(cache).__name__}")
    if len(cache.layers) != num_layers:
        raise ValueError(f"`past_key_values` has {len(cache.layers)} layers, the model has {num_layers}")


def output_of(
    engine: Engine, sequences: torch.Tensor, confidences: torch.Tensor, reused: int
) -> BardVLGenerationOutput:
    """All that a call knows about its responses; `reused` columns of the prompts came from the cache."""
    num_encoded = (engine.prompt.lengths - reused).repeat_interleave(engine.settings.num_return_sequences)
    return BardVLGenerationOutput(
        sequences=sequences,
        num_tokens=engine.rows.response_length[: engine.rows.spare].cpu(),
        tokens_per_forward=engine.tokens_per_forward(),
        cache=engine.cache,
        block_step_counts=engine.step_counts(),
        num_forwards=dict(engine.num_forwards),
        num_encoded_tokens=num_encoded.cpu(),
        confidences=confidences,
        history=engine.history if engine.hooks.keep_history else None,
        dictated=None if engine.hooks.form is None else engine.dictated(),
    )


def with_extras(engine: Engine, responses: torch.Tensor, config: BardVLGenerationConfig) -> Any:
    """The response ids, as the reference returns them: in a tuple with what else its arguments ask for."""
    extras: list[Any] = []
    if engine.hooks.keep_history:
        size, longest = engine.settings.block_size, responses.shape[1]
        extras.append([responses[:, :end].cpu() for end in range(size, longest + size, size)])
    if setting(config, "return_step_stats"):
        extras.append(engine.reference_statistics())
    return (responses, *extras) if extras else responses


def split_inputs(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """Ids, mask and visual inputs of the processor's output; `ValueError` names what has no place in it."""
    input_ids, attention_mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    given = {name: value for name, value in given.items() if not asks_for_nothing(name, value)}
    unknown = sorted(given.keys() - {*VISUAL_INPUTS})
    if unknown:
        raise ValueError(f"unexpected inputs: {', '.join(unknown)}")
    if input_ids is None:
        raise ValueError("no `input_ids`")
    check_ids(input_ids)
    return input_ids.long(), attention_mask, {name: visual_tensor(name, value) for name, value in given.items()}


def check_answers(config: Any, answers: Any, num_prompts: int, mask_token_id: int) -> None:
    """Raise `ValueError` unless `answers` are (answers, length) ids, right-padded with -100, that fit the prompts."""
    integers = (torch.int64, torch.int32, torch.int16)
    if (
        not isinstance(answers, torch.Tensor)
        or answers.ndim != 2
        or answers.dtype not in integers
        or 0 in answers.shape
    ):
        raise ValueError(f"`answers` must be a non-empty integer tensor (answers, length), got {answers!r}")
    if num_prompts not in (1, len(answers)):
        raise ValueError(f"{len(answers)} answers for {num_prompts} prompts: give one prompt, or one an answer")
    given = answers != -100
    if (given.long().diff(dim=1) > 0).any() or not given[:, 0].all():
        raise ValueError("`answers` must have a token in front and be padded with -100 on the right")
    vocab_size = config.get_text_config().vocab_size
    wrong = answers[given & ((answers < 0) | (answers >= vocab_size) | (answers == mask_token_id))]
    if len(wrong):
        raise ValueError(
            f"answer id {int(wrong[0])} is the mask token or outside the vocabulary of {vocab_size} tokens"
        )


def _explicit(config: GenerationConfig | None) -> dict[str, Any]:
    """The settings that a config states: its own list, or for a plain config what differs from the defaults."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise ValueError(
            f"`generation_config` must be a GenerationConfig, got {type(config).__name__}; settings may also be given "
            "as keyword arguments"
        )
    # By its method, not its class: remote code may have loaded the class twice.
    if not hasattr(config, "explicit"):
        return drop_plain_defaults(config.to_dict())
    config.validate()  # servers set fields of a copy, foreign ones too
    return config.explicit()


# What devices say that have no exception of their own for it.
_NO_MEMORY = ("DefaultCPUAllocator: ", "MPS backend out of memory")


@contextlib.contextmanager
def memory_advice(model: Any, prompt: Prompt, settings: DecodingSettings) -> Iterator[None]:
    """Raise `torch.OutOfMemoryError` with what takes less memory where a device runs out of it.

    Buffers that wait for later calls are given back, so that a smaller call finds more room.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(said in str(error) for said in _NO_MEMORY):
            raise
        release_idle(model)
        num_rows, longest = len(prompt.host_lengths) * settings.num_return_sequences, max(prompt.host_lengths)
        advice = [f"lower `max_new_tokens`, which is {settings.max_new_tokens}"]
        advice += ["set `prefill_chunk_size`"] if settings.prefill_chunk_size is None else []
        advice += ["bound the pixels of images"] if prompt.visual_inputs else []
        advice += [f"answer fewer than {num_rows} rows at once"] if num_rows > 1 else []
        raise torch.OutOfMemoryError(
            f"{prompt.input_ids.device} ran out of memory over {num_rows} row(s), prompts of {longest} tokens at most: "
            f"{', or '.join(advice)}; `bard_vl.estimate_memory` tells beforehand what a call takes"
        ) from error


__all__ = ["BardVLGenerationMixin", "BardVLGenerationOutput"]
