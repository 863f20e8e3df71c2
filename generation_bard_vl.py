"""Block-diffusion decoding: `generate` and `score`.

A batch lives in one table of tokens, every row from column 0: its prompt, then its response in blocks. Every forward
encodes a window of columns under one rule, a token sees its own and earlier blocks (see masking_bard_vl), and writes the
window's keys and values in place. A prompt therefore shares a forward with the first step of its first block, and a
finished block with the first step of the next; a separate pass to commit keys and values is never needed.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
)
from transformers.utils import ModelOutput

from .cache_bard_vl import BardVLCache
from .generation_config_bard_vl import (
    FIELDS,
    BardVLGenerationConfig,
    DecodingSettings,
    drop_plain_defaults,
    resolve_block_size,
    resolve_mask_token_id,
    setting,
    token_ids,
)
from .inputs_bard_vl import (
    VISUAL_INPUTS,
    Prompt,
    VisualFeatures,
    check_length,
    check_prompt,
    check_visual_inputs,
)
from .masking_bard_vl import check_attention_implementation, partition_sequence, to_attention_mask
from .remasking_bard_vl import REMASKING_RULES, choose_tokens, transfer_schedule


@dataclass
class DenoisingStep:
    """One step of one row's block.

    Attributes:
        block: index of the block in the response.
        ids: (block size,) CPU ids after the step, the mask id where undecided.
        committed: (block size,) bool, decided at this step.
        confidence: (block size,) probability of the token that each position would have taken.
    """

    block: int
    ids: torch.Tensor
    committed: torch.Tensor
    confidence: torch.Tensor


@dataclass
class BardVLGenerationOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`. Rows are those of `sequences`.

    Attributes:
        sequences: (rows, prompt + response) ids, padded left of the prompt as given and right of the response.
        tokens_per_forward: (rows,) response tokens, up to and including the first EOS, over the forwards that the row
            took part in, whatever they were for.
        past_key_values: the cache, for the next turn.
        block_step_counts: (rows, blocks) denoising steps of each block, 0 where a row has no such block.
        num_forwards: forwards of the language model by kind: `prefill+denoise`, `denoise`, `commit+denoise`. A forward
            counts once, however many rows took part.
        num_encoded_tokens: (rows,) prompt tokens that this call encoded; the others came from `past_key_values`.
        confidences: (rows, response) probability that the model gave each token when it committed, 0 for padding.
        history: per row, the denoising steps in order; None unless `output_history=True`.
    """

    sequences: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    past_key_values: BardVLCache | None = None
    block_step_counts: torch.LongTensor | None = None
    num_forwards: dict[str, int] | None = None
    num_encoded_tokens: torch.LongTensor | None = None
    confidences: torch.FloatTensor | None = None
    history: list[list[DenoisingStep]] | None = None


class BardVLGenerationMixin:
    """`generate` and `score` for a Bard-VL model."""

    generation_config_class = BardVLGenerationConfig

    @property
    def generation_config(self) -> BardVLGenerationConfig | None:
        """Defaults of `generate`; whatever transformers assigns becomes a `BardVLGenerationConfig`."""
        return self.__dict__.get("_generation_config")

    @generation_config.setter
    def generation_config(self, config: GenerationConfig | None) -> None:
        if config is not None and not isinstance(config, BardVLGenerationConfig):
            config = BardVLGenerationConfig.from_plain(config)
        self.__dict__["_generation_config"] = config

    @torch.no_grad()
    def generate(
        self,
        inputs: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: list[Callable] | None = None,
        stopping_criteria: list[Callable] | None = None,
        streamer: Any = None,
        past_key_values: BardVLCache | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
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
                (1, n), scores (1, vocabulary)) before choice and confidence.
            stopping_criteria: each is called with (prompt and response prefix (1, n), None) for every prefix of a
                finished block, in order.
            streamer: gets the prompt, then `put` with the ids of each finished block, and `put_draft(value=ids)` after
                each step if it has that method; undecided tokens hold the mask id. One row only.
            past_key_values: `past_key_values` of an earlier call whose prompts begin like these; it is updated in place.
            generator: source of randomness on the model's device; or `seed`.
            tokenizer: needed with `stop_strings`.

        Returns:
            Prompt and response ids (rows, length), or the response ids alone for a mapping, followed by history and
            statistics where `output_history` and `return_step_stats` ask for them; or, with
            `return_dict_in_generate=True`, a `BardVLGenerationOutput`. Nothing but padding follows an EOS.

        Raises:
            ValueError: a prompt or a setting is wrong, or not supported; raised before anything is computed.
        """
        # 1. Settings and checks
        from_mapping = isinstance(inputs, Mapping)
        model_inputs = dict(inputs) if from_mapping else {} if inputs is None else {"input_ids": inputs}
        config = self._generation_settings(generation_config, kwargs, model_inputs)
        input_ids, attention_mask, visual_inputs = self._split_inputs(model_inputs)
        settings = DecodingSettings.resolve(config, self.config, input_ids.shape[-1])
        check_attention_implementation(self.config.text_config._attn_implementation)
        attention_mask = check_prompt(self.config, input_ids, attention_mask, settings.mask_token_id)
        check_visual_inputs(self.config, input_ids, **visual_inputs)
        num_rows = len(input_ids) * settings.num_return_sequences
        if streamer is not None and num_rows > 1:
            raise ValueError(f"a streamer follows one row, this batch has {num_rows}")
        return_dict = setting(config, "return_dict_in_generate")
        output_history = setting(config, "output_history")
        if output_history and not (return_dict or from_mapping):
            raise ValueError("`output_history=True` needs `return_dict_in_generate=True`, or the inputs as a mapping")
        if past_key_values is not None and not hasattr(past_key_values, "shared_prefix"):
            raise ValueError(
                f"`past_key_values` must be a cache that `generate` returned, got {type(past_key_values).__name__}"
            )
        hooks = DecodingHooks(
            processors=_logits_processors(config, logits_processor, input_ids.device),
            criteria=_stopping_criteria(config, stopping_criteria, tokenizer),
            streamer=streamer,
            generator=_generator(generator, seed, input_ids.device),
            keep_history=output_history,
        )

        # 2. Layout and reuse
        prompt = self._realign(input_ids, attention_mask, visual_inputs)
        num_blocks = -(-settings.max_new_tokens // settings.block_size)
        check_length(self.config, prompt, num_blocks * settings.block_size)
        cache = BardVLCache(self.config.text_config.num_hidden_layers) if past_key_values is None else past_key_values
        track = return_dict or past_key_values is not None
        contents = prompt.contents(self.config) if track else [prompt.input_ids[:0, 0].cpu()] * len(input_ids)
        reused = cache.shared_prefix(contents, settings.block_size)

        # 3. and 4. Decode
        if streamer is not None:
            streamer.put(input_ids.cpu())
        with cache.generation(contents, settings.block_size):
            decoder = BlockDecoder(self, prompt, settings, cache, hooks)
            decoder.prefill(reused)
            while decoder.rows:
                decoder.step()
            if track:
                cache.contents = decoder.encoded_contents(contents)
        if streamer is not None:
            streamer.end()

        # 5. Output
        responses, confidences = decoder.responses()
        prompts = input_ids.repeat_interleave(settings.num_return_sequences, dim=0)
        sequences = torch.cat([prompts, responses], dim=1)
        if return_dict:
            return BardVLGenerationOutput(
                sequences=sequences,
                tokens_per_forward=decoder.tokens_per_forward(),
                past_key_values=cache,
                block_step_counts=decoder.step_counts(),
                num_forwards=dict(decoder.num_forwards),
                num_encoded_tokens=(prompt.lengths - reused).repeat_interleave(settings.num_return_sequences).cpu(),
                confidences=confidences,
                history=decoder.history if output_history else None,
            )
        if not from_mapping:
            return sequences
        extras = []
        if output_history:
            size, longest = settings.block_size, responses.shape[1]
            extras.append([responses[:, :end].cpu() for end in range(size, longest + size, size)])
        if setting(config, "return_step_stats"):
            extras.append(decoder.reference_statistics())
        return (responses, *extras) if extras else responses

    @torch.no_grad()
    def score(
        self,
        inputs: Mapping[str, Any],
        answers: torch.LongTensor,
        block_size: int | None = None,
        mask_token_id: int | None = None,
        positions_per_forward: int = 64,
    ) -> torch.FloatTensor:
        """Pseudo-log-likelihood of given answers, token by token, for multiple-choice evaluation.

        Each answer token is masked alone and predicted from the prompt, the answer's earlier blocks and the other tokens
        of its block (Salazar et al. 2020, arXiv 1910.14659, under block-causal attention); positions of the last block
        behind the answer hold the mask token, as they may in decoding.

        Args:
            inputs: the processor's output for one prompt, which is encoded once for all answers, or for one prompt an
                answer.
            answers: (answers, length) ids, padded with -100 on the right.
            block_size, mask_token_id: default to the config's.
            positions_per_forward: answer tokens scored together.

        Returns:
            (answers, length) log-probabilities in float32, 0 for padding. Their sum over the last axis is the score.

        Raises:
            ValueError: prompts or answers are wrong, or their numbers do not match.
        """
        # 1. Checks
        input_ids, attention_mask, visual_inputs = self._split_inputs(dict(inputs))
        block_size = resolve_block_size(block_size, self.config)
        mask_token_id = resolve_mask_token_id(mask_token_id, self.config)
        check_attention_implementation(self.config.text_config._attn_implementation)
        attention_mask = check_prompt(self.config, input_ids, attention_mask, mask_token_id)
        check_visual_inputs(self.config, input_ids, **visual_inputs)
        check_answers(self.config, answers, len(input_ids), mask_token_id)
        prompt = self._realign(input_ids, attention_mask, visual_inputs)
        num_columns = -(-answers.shape[1] // block_size) * block_size
        check_length(self.config, prompt, num_columns)

        # 2. Encode every prompt once, then the answers without masks: what later blocks see
        answers = answers.to(input_ids.device)
        table = TokenTable.lay_out(prompt, num_columns, block_size, mask_token_id)
        cache = BardVLCache(self.config.text_config.num_hidden_layers)
        rows = torch.arange(len(answers), device=input_ids.device)
        with cache.generation([torch.empty(0)] * len(input_ids), block_size):
            encoder = WindowEncoder(self, table, cache)
            encoder.encode_prompts(prompt, 0, prompt.input_ids.shape[1])
            if len(answers) > len(input_ids):
                cache.repeat_rows(len(answers))
                table.repeat_rows(len(answers))
            columns = table.lengths[:, None] + torch.arange(answers.shape[1], device=input_ids.device)
            table.ids.scatter_(1, columns, answers.masked_fill(answers < 0, mask_token_id))
            encoder.encode(rows, table.lengths, num_columns, table.num_columns)

            # 3. Mask the answer's tokens one at a time, a chunk of masked copies of blocks a forward
            scores = []
            for chunk in torch.arange(answers.shape[1], device=input_ids.device).split(positions_per_forward):
                hidden = encoder.encode_masked_copies(chunk, block_size, mask_token_id)
                log_probs = self.lm_head(hidden).float().log_softmax(-1).to(answers.device)
                targets = answers[:, chunk].clamp(min=0)
                scores.append(log_probs.gather(-1, targets[..., None])[..., 0])
        return torch.cat(scores, dim=1).masked_fill(answers < 0, 0.0)

    def _generation_settings(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any], model_inputs: dict[str, Any]
    ) -> BardVLGenerationConfig:
        """Merge the model's settings, `generation_config` and keyword arguments; the last become `model_inputs` if known.

        Keyword arguments override even with None, which unsets a field.
        """
        merged = self.generation_config.explicit() if self.generation_config is not None else {}
        if hasattr(generation_config, "explicit"):
            merged.update(generation_config.explicit())
        elif generation_config is not None:
            merged.update(drop_plain_defaults(generation_config.to_dict()))
        for name, value in kwargs.items():
            if name in (*VISUAL_INPUTS, "input_ids", "attention_mask", "mm_token_type_ids"):
                if name in model_inputs:
                    raise ValueError(f"`{name}` is given twice")
                model_inputs[name] = value
            else:
                merged[name] = value
        # The steps stored for a checkpoint's own block size do not bind a call that names another.
        if kwargs.get("block_size") is not None and "denoising_steps" not in kwargs:
            merged.pop("denoising_steps", None)
        return BardVLGenerationConfig(**merged)

    def _split_inputs(
        self, model_inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """Ids, mask and visual inputs of the processor's output; `ValueError` names what has no place in it."""
        model_inputs.pop("mm_token_type_ids", None)  # follows from the ids
        input_ids, attention_mask = model_inputs.pop("input_ids", None), model_inputs.pop("attention_mask", None)
        unknown = sorted(set(model_inputs) - set(VISUAL_INPUTS))
        if unknown:
            raise ValueError(f"unexpected inputs: {', '.join(unknown)}")
        if input_ids is None:
            raise ValueError("no `input_ids`")
        visual_inputs = {name: value for name, value in model_inputs.items() if value is not None}
        return input_ids, attention_mask, visual_inputs

    def _realign(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, visual_inputs: dict[str, torch.Tensor]
    ) -> Prompt:
        grids = {name: visual_inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        positions = self.get_position_ids(input_ids, attention_mask, **grids)[1:]
        return Prompt.realign(input_ids, attention_mask, positions, visual_inputs)


@dataclass
class DecodingHooks:
    """The caller's parts of the loop."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: Any
    generator: torch.Generator | None
    keep_history: bool


@dataclass
class TokenTable:
    """Tokens, positions and blocks of a batch, every row from column 0: prompt, response, room to spare.

    Attributes:
        ids: (rows, columns), the mask id where undecided.
        positions: (4, rows, columns) text position (the column), temporal, height and width.
        blocks: (rows, columns) block numbers, ascending along a row.
        lengths: (rows,) prompt tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    lengths: torch.Tensor

    @property
    def num_columns(self) -> int:
        """Columns of the table."""
        return self.ids.shape[1]

    @classmethod
    def lay_out(cls, prompt: Prompt, num_new_columns: int, block_size: int, mask_token_id: int) -> "TokenTable":
        """Lay prompts out with room for `num_new_columns` response tokens, all undecided, behind each."""
        rows, longest = prompt.input_ids.shape
        # One block to spare: a row that is not ready for the next block still takes part in a window of two.
        columns = torch.arange(longest + num_new_columns + block_size, device=prompt.input_ids.device)
        behind = columns[None] - prompt.lengths[:, None]
        pad = [0, num_new_columns + block_size]
        ids = torch.nn.functional.pad(prompt.input_ids, pad).masked_fill_(behind >= 0, mask_token_id)
        positions = torch.where(
            behind < 0,
            torch.nn.functional.pad(prompt.positions, pad),
            prompt.next_position[:, None] + behind,
        )
        text = columns.expand(1, rows, -1)
        blocks = partition_sequence(prompt.lengths, len(columns), block_size)
        return cls(ids, torch.cat([text, positions]), blocks, prompt.lengths)

    def repeat_rows(self, times: int) -> None:
        """Repeat every row `times` times, next to itself."""
        self.ids = self.ids.repeat_interleave(times, dim=0)
        self.positions = self.positions.repeat_interleave(times, dim=1)
        self.blocks = self.blocks.repeat_interleave(times, dim=0)
        self.lengths = self.lengths.repeat_interleave(times, dim=0)


class WindowEncoder:
    """Encodes windows of a token table into hidden states, and their keys and values into a cache."""

    def __init__(self, model: Any, table: TokenTable, cache: BardVLCache):
        self.model, self.table, self.cache = model, table, cache
        self.attention = model.config.text_config._attn_implementation

    def encode_prompts(self, prompt: Prompt, first: int, end: int) -> torch.Tensor:
        """Encode columns [first, end) of every row, images included, behind columns that the cache holds already."""
        rows = torch.arange(len(prompt.lengths), device=prompt.lengths.device)
        features = self.model.model.encode_visual(prompt.input_ids, prompt.visual_inputs, first)
        return self.encode(rows, torch.full_like(rows, first), end - first, end, features)

    def encode(
        self, rows: torch.Tensor, first: torch.Tensor, width: int, end: int, features: VisualFeatures | None = None
    ) -> torch.Tensor:
        """Encode a window of every row.

        Args:
            rows: (n,) rows of the table, in the order of the cache's.
            first: (n,) first column of each row's window.
            width: columns of the window.
            end: no window reaches past this column.
            features: visual features, for windows that hold prompt tokens.

        Returns:
            (n, width, hidden) hidden states after the last norm.
        """
        columns = first[:, None] + torch.arange(width, device=first.device)
        cell = (rows[:, None], columns)
        visible = self.table.blocks[rows, None, :end] <= self.table.blocks[cell][:, :, None]
        return self.forward(self.table.ids[cell], self.table.positions[(slice(None), *cell)], columns, visible, features)

    def encode_masked_copies(self, answer_positions: torch.Tensor, block_size: int, mask_token_id: int) -> torch.Tensor:
        """Hidden state of every answer token masked alone in a copy of its block: (rows, positions, hidden).

        The copies lie side by side in columns behind the table. A copy sees the blocks before its own, and itself.
        """
        table, device = self.table, answer_positions.device
        rows = torch.arange(len(table.lengths), device=device)
        start = answer_positions // block_size * block_size
        source = start[:, None] + torch.arange(block_size, device=device)
        source = table.lengths[:, None] + source.flatten()
        cell = (rows[:, None], source)
        masked = torch.arange(len(answer_positions), device=device) * block_size + answer_positions - start
        ids = table.ids[cell].index_fill(1, masked, mask_token_id)
        copy = torch.arange(len(answer_positions), device=device).repeat_interleave(block_size)
        before = table.blocks[:, None, :] < table.blocks[cell][:, :, None]
        own = (copy[:, None] == copy[None]).expand(len(rows), -1, -1)
        columns = (table.num_columns + torch.arange(len(copy), device=device)).expand(len(rows), -1)
        hidden = self.forward(ids, table.positions[(slice(None), *cell)], columns, torch.cat([before, own], dim=-1))
        return hidden[:, masked]

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        columns: torch.Tensor,
        visible: torch.Tensor,
        features: VisualFeatures | None = None,
    ) -> torch.Tensor:
        """One forward of the language model: ids (n, width), positions (4, n, width), visible (n, width, end)."""
        text_model = self.model.model.language_model
        embeds = text_model.embed_tokens(ids)
        visual: dict[str, Any] = {}
        if features is not None:
            index = torch.nn.functional.pad(features.index, [0, self.table.num_columns], value=-1).gather(1, columns)
            is_visual = index >= 0
            chosen = index[is_visual].to(features.embeds.device)
            embeds = embeds.masked_scatter(
                is_visual[..., None].to(embeds.device), features.embeds[chosen].to(embeds.device, embeds.dtype)
            )
            visual["visual_pos_masks"] = is_visual
            visual["deepstack_visual_embeds"] = [layer[chosen] for layer in features.deepstack]
        end = visible.shape[-1]
        capacity = max(end, self.table.num_columns)
        with self.cache.writing(columns, end, capacity):
            return text_model(
                inputs_embeds=embeds,
                attention_mask=to_attention_mask(visible, self.attention, embeds.dtype),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                **visual,
            )[0]


class BlockDecoder:
    """The state of one call of `generate`: each row denoises its own block at its own pace.

    `rows` lists the rows that are still decoding in the order of the cache's rows; everything else is by row.
    """

    def __init__(
        self, model: Any, prompt: Prompt, settings: DecodingSettings, cache: BardVLCache, hooks: DecodingHooks
    ):
        self.model, self.prompt, self.settings, self.cache, self.hooks = model, prompt, settings, cache, hooks
        num_blocks = -(-settings.max_new_tokens // settings.block_size)
        self.table = TokenTable.lay_out(
            prompt, num_blocks * settings.block_size, settings.block_size, settings.mask_token_id
        )
        self.encoder = WindowEncoder(model, self.table, cache)
        self.device = prompt.input_ids.device
        self.schedule = transfer_schedule(settings.block_size, settings.denoising_steps).to(self.device)
        self.eos = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=self.device)
        self.num_forwards: Counter[str] = Counter()
        num_rows = len(prompt.lengths) * settings.num_return_sequences
        self.lengths = [n for n in prompt.host_lengths for _ in range(settings.num_return_sequences)]
        self.rows = list(range(num_rows))
        self.steps: list[list[int]] = [[0] for _ in range(num_rows)]  # per row and block
        self.response_lengths = [0] * num_rows
        self.history: list[list[DenoisingStep]] = [[] for _ in range(num_rows)]
        self.confidences = torch.zeros(num_rows, self.table.num_columns, device=self.device)
        self.logits = torch.empty(0)

    def prefill(self, reused: int) -> None:
        """Encode the prompts from column `reused` on, together with the first step of every first block."""
        size, copies = self.settings.block_size, self.settings.num_return_sequences
        hidden = self.encoder.encode_prompts(self.prompt, reused, max(self.lengths) + size)
        self.num_forwards["prefill+denoise" if max(self.lengths) > reused else "denoise"] += 1
        self.logits = self._block_logits(hidden, self.table.lengths - reused)
        if copies > 1:
            self.cache.repeat_rows(copies)
            self.table.repeat_rows(copies)
            self.logits = self.logits.repeat_interleave(copies, dim=0)

    def step(self) -> None:
        """Decide on the last forward's logits, let rows end or move on, and encode the next forward's windows."""
        finished = self._denoise()
        ended = {row for row in self.rows if finished[row] and self._finish_block(row)}
        for row in ended:
            slot = self.rows.index(row)
            self.cache.retire(slot, len(self.rows) - 1)
            self.rows[slot] = self.rows[-1]
            self.rows.pop()
        if self.rows:
            self._encode_windows({row for row in self.rows if finished[row]})

    def _denoise(self) -> list[bool]:
        """Choose and commit tokens in every row's block; say by row whether its block is finished."""
        settings, mask_id = self.settings, self.settings.mask_token_id
        rows = torch.tensor(self.rows, device=self.device)
        start = torch.tensor([self._block_start(row) for row in self.rows], device=self.device)
        cell = (rows[:, None], start[:, None] + torch.arange(settings.block_size, device=self.device))
        block = self.table.ids[cell]
        masked = block == mask_id
        if self.hooks.processors:
            self._process_logits(masked)
        ids, confidence = choose_tokens(
            self.logits, mask_id, settings.temperature, settings.top_k, settings.top_p, self.hooks.generator
        )
        quota = self.schedule[torch.tensor([self.steps[row][-1] for row in self.rows], device=self.device)]
        rule = REMASKING_RULES[settings.remasking_strategy]
        commit = rule(confidence, masked, quota, settings.confidence_threshold)
        block = torch.where(commit, ids, block)
        self.table.ids[cell] = block
        self.confidences[cell] = torch.where(commit, confidence, self.confidences[cell])
        for row in self.rows:
            self.steps[row][-1] += 1
        self._report(block, commit, confidence)
        finished = dict(zip(self.rows, (block != mask_id).all(-1).tolist(), strict=True))
        return [finished.get(row, False) for row in range(len(self.steps))]

    def _process_logits(self, masked: torch.Tensor) -> None:
        """Run the logits processors at every undecided position with the committed tokens left of it."""
        logits = self.logits.float()
        for slot, row in enumerate(self.rows):
            start = self._block_start(row)
            for offset in masked[slot].nonzero()[:, 0].tolist():
                left = self.table.ids[row, : start + offset]
                left = left[left != self.settings.mask_token_id]
                logits[slot, offset] = self.hooks.processors(left[None], logits[slot, offset][None])[0]
        self.logits = logits

    def _report(self, block: torch.Tensor, commit: torch.Tensor, confidence: torch.Tensor) -> None:
        """Hand a draft to the streamer and keep the history, if asked."""
        if hasattr(self.hooks.streamer, "put_draft"):
            self.hooks.streamer.put_draft(value=block.cpu())
        if self.hooks.keep_history:
            for row, *parts in zip(self.rows, block.cpu(), commit.cpu(), confidence.cpu(), strict=True):
                self.history[row].append(DenoisingStep(len(self.steps[row]) - 1, *parts))

    def _finish_block(self, row: int) -> bool:
        """Find the end of the response in a finished block; without one, go to the next block. True if it ended."""
        size, start = self.settings.block_size, self._block_start(row)
        done = start - self.lengths[row]
        tokens = self.table.ids[row, start : start + size][: self.settings.max_new_tokens - done]
        is_eos = torch.isin(tokens, self.eos).tolist()
        kept = is_eos.index(True) + 1 if any(is_eos) else len(tokens)
        ended = any(is_eos) or done + kept == self.settings.max_new_tokens
        for count in range(1, kept + 1) if self.hooks.criteria else ():
            if bool(self.hooks.criteria(self.table.ids[row, : start + count][None], None).all()):
                kept, ended = count, True
                break
        if self.hooks.streamer is not None:
            self.hooks.streamer.put(tokens[None, :kept].cpu())
        self.response_lengths[row] = done + kept
        if not ended:
            self.steps[row].append(0)
        return ended

    def _encode_windows(self, moved_on: set[int]) -> None:
        """Encode every row's block; rows that moved on encode their finished block, now clean, in the same window."""
        size = self.settings.block_size
        carried = torch.tensor([size if row in moved_on else 0 for row in self.rows], device=self.device)
        start = torch.tensor([self._block_start(row) for row in self.rows], device=self.device)
        width = 2 * size if moved_on else size
        end = max(self._block_start(row) + (width if row not in moved_on else size) for row in self.rows)
        hidden = self.encoder.encode(torch.tensor(self.rows, device=self.device), start - carried, width, end)
        self.num_forwards["commit+denoise" if moved_on else "denoise"] += 1
        self.logits = self._block_logits(hidden, carried)

    def _block_logits(self, hidden: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Logits (n, block, vocabulary) of the block that begins `offset` (n,) tokens into each window."""
        columns = offset[:, None] + torch.arange(self.settings.block_size, device=self.device)
        columns = columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        return self.model.lm_head(hidden.gather(1, columns)).to(self.device)

    def _block_start(self, row: int) -> int:
        """Column of the first token of the row's current block."""
        return self.lengths[row] + (len(self.steps[row]) - 1) * self.settings.block_size

    def responses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Response ids (rows, longest) padded on the right, and the confidence of each token, 0 for padding."""
        longest = max(self.response_lengths)
        columns = torch.arange(longest, device=self.device)
        cell = (torch.arange(len(self.lengths), device=self.device)[:, None], self.table.lengths[:, None] + columns)
        padding = columns >= torch.tensor(self.response_lengths, device=self.device)[:, None]
        ids = self.table.ids[cell].masked_fill(padding, self.settings.pad_token_id)
        return ids, self.confidences[cell].masked_fill(padding, 0.0)

    def tokens_per_forward(self) -> torch.Tensor:
        """(rows,) response tokens over forwards; each forward of a row is one of its steps, nothing else is encoded."""
        forwards = torch.tensor([sum(steps) for steps in self.steps])
        return torch.tensor(self.response_lengths) / forwards

    def step_counts(self) -> torch.Tensor:
        """(rows, blocks) steps of each block, 0 where a row has no such block."""
        blocks = max(len(steps) for steps in self.steps)
        return torch.tensor([steps + [0] * (blocks - len(steps)) for steps in self.steps])

    def reference_statistics(self) -> dict[str, Any]:
        """The reference's `return_step_stats`, with tokens counted to the first EOS."""
        counts = self.step_counts()
        tokens, steps = sum(self.response_lengths), int(counts.sum())
        return {
            "block_step_counts": counts,
            "num_response_tokens": tokens,
            "num_denoising_steps": steps,
            "tpf": tokens / steps,
        }

    def encoded_contents(self, contents: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the cache holds of each row in the partition of a later prompt, which is cut from position 0.

        A response's blocks begin where its prompt ended: only after a prompt of whole blocks do they fit that partition.
        """
        size, encoded = self.settings.block_size, []
        for row, length in enumerate(self.lengths):
            known = contents[row // self.settings.num_return_sequences]
            whole = length // size * size
            if whole == length:
                committed = (len(self.steps[row]) - 1) * size
                known = torch.cat([known, self.table.ids[row, length : length + committed].cpu()])
                whole = length + committed
            encoded.append(known[:whole])
        return encoded


def check_answers(config: Any, answers: Any, num_prompts: int, mask_token_id: int) -> None:
    """Raise `ValueError` unless `answers` are (answers, length) ids, right-padded with -100, that fit the prompts."""
    if not isinstance(answers, torch.Tensor) or answers.ndim != 2 or answers.is_floating_point() or 0 in answers.shape:
        raise ValueError(f"`answers` must be a non-empty integer tensor (answers, length), got {answers!r}")
    if num_prompts not in (1, len(answers)):
        raise ValueError(f"{len(answers)} answers for {num_prompts} prompts: give one prompt, or one an answer")
    given = answers != -100
    if (given.long().diff(dim=1) > 0).any() or not given[:, 0].all():
        raise ValueError("`answers` must have a token in front and be padded with -100 on the right")
    vocab_size = config.get_text_config().vocab_size
    wrong = answers[given & ((answers < 0) | (answers >= vocab_size) | (answers == mask_token_id))]
    if len(wrong):
        raise ValueError(f"answer id {int(wrong[0])} is the mask token or outside the vocabulary of {vocab_size} tokens")


def _logits_processors(
    config: BardVLGenerationConfig, extra: list[Callable] | None, device: torch.device
) -> LogitsProcessorList:
    """transformers' processors for the settings that name one, then the caller's."""
    processors = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(penalty=config.repetition_penalty))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        processors.append(NoBadWordsLogitsProcessor(config.bad_words_ids, list(token_ids(config.eos_token_id)) or None))
    if config.suppress_tokens is not None:
        processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    processors.extend(extra or [])
    return processors


def _stopping_criteria(
    config: BardVLGenerationConfig, extra: list[Callable] | None, tokenizer: Any
) -> StoppingCriteriaList:
    """transformers' criteria for the settings that name one, then the caller's."""
    criteria = StoppingCriteriaList()
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError(f"`stop_strings` = {config.stop_strings!r} needs `tokenizer=` in the call of `generate`")
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings))
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(max_time=config.max_time))
    criteria.extend(extra or [])
    return criteria


def _generator(generator: torch.Generator | None, seed: int | None, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("give `generator` or `seed`, not both")
    return torch.Generator(device=device).manual_seed(seed)


__all__ = ["FIELDS", "BardVLGenerationMixin", "BardVLGenerationOutput", "DenoisingStep"]
