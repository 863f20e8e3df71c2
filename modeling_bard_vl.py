"""Bard-VL: Qwen3-VL with block-causal attention, a same-position loss and a block-diffusion `generate`.

The modules and their weights are Qwen3-VL's (arXiv 2604.16514 adds no parameters); a class is here only for what
differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLModel

# transformers 4.57 copies only direct imports of this file to its module cache: indirect ones are imported here too.
from .attention_bard_vl import ATTENTION_NAME
from .cache_bard_vl import BardVLCache
from .compat_bard_vl import (
    MODEL_AUTO_CLASSES,
    CacheOutput,
    CheckpointedLayer,
    PortableModel,
    attention_of,
    cache_of,
    encode_text,
    multimodal_positions,
    one_cache,
    set_attention,
    visual_features,
)
from .configuration_bard_vl import BardVLConfig, check_integer, warn_if_seed
from .engine_bard_vl import Engine
from .forms_bard_vl import Form
from .generation_bard_vl import BardVLGenerationMixin
from .generation_config_bard_vl import BardVLGenerationConfig, python_value, resolve_block_size
from .hooks_bard_vl import DecodingHooks
from .inputs_bard_vl import (
    VISUAL_INPUTS,
    VisualFeatures,
    check_known,
    check_positions,
    check_tensors,
    check_visual_index,
    check_visual_inputs,
    check_visual_layout,
    grids_of,
    visual_items,
    visual_tensor,
)
from .kernel_bard_vl import attend_slots
from .layers_bard_vl import Layers
from .masking_bard_vl import (
    PADDING_BLOCK,
    block_visibility,
    check_attention_implementation,
    check_block_mask,
    check_explicit_mask,
    partition_prompt,
    to_attention_mask,
)
from .processors_bard_vl import TokenProcessors
from .recording_bard_vl import Recording
from .remasking_bard_vl import REMASKING_RULES
from .rows_bard_vl import Rows
from .spelling_bard_vl import Spelling
from .structured_bard_vl import BlockForm

AUTO_MAP = {
    "AutoConfig": "configuration_bard_vl.BardVLConfig",
    **dict.fromkeys(MODEL_AUTO_CLASSES, "modeling_bard_vl.BardVLForConditionalGeneration"),
}


OTHER_INPUTS = ("use_cache", "output_hidden_states", "output_attentions")  # of the text model, and harmless


@dataclass
class BardVLModelOutput(CacheOutput):
    """Hidden states (batch, length, hidden) after the last norm, and what else was asked for."""

    last_hidden_state: torch.Tensor | None = None
    cache: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class BardVLOutput(CacheOutput):
    """Loss, logits (batch, kept, vocabulary), and what else was asked for. `past_key_values` is the same as `cache`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class BardVLModel(PortableModel, Qwen3VLModel):
    """Qwen3-VL's trunk with block-causal attention."""

    config_class = BardVLConfig

    def __init__(self, config: BardVLConfig):
        super().__init__(config)
        for layer in self.language_model.layers:
            layer.__class__ = CheckpointedLayer

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        block_size: int | None = None,
        block_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        visual_index: torch.Tensor | None = None,
        cache: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode tokens; the arguments are those of `BardVLForConditionalGeneration.forward`."""
        visual_inputs = {name: kwargs.pop(name, None) for name in VISUAL_INPUTS}
        visual_inputs = {name: None if v is None else visual_tensor(name, v) for name, v in visual_inputs.items()}
        check_known("forward", kwargs, OTHER_INPUTS)
        check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, block_ids=block_ids)
        check_tensors(visual_index=visual_index)
        if not isinstance(attention_mask, BlockMask):
            check_tensors(attention_mask=attention_mask)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
        input_ids, cache = None if input_ids is None else input_ids.long(), one_cache(past_key_values, cache)
        tokens = next(given for given in (input_ids, inputs_embeds) if given is not None)
        cached = cache.get_seq_length() if cache is not None else 0
        self._check_visual(input_ids, visual_index, tokens, visual_inputs)
        mask = self.get_block_mask(tokens, cached, attention_mask, block_size, block_ids)
        if position_ids is None:
            whole = input_ids if visual_index is None and not cached else None
            position_ids = self._derived_positions(whole, attention_mask, visual_inputs)
        check_positions(position_ids, *tokens.shape[:2])
        features = None
        if visual_index is not None:
            features = self.encode_indexed(visual_index, visual_inputs)
        elif input_ids is not None:
            features = self.encode_visual(input_ids, visual_inputs)
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        embeds, deepstack = (embeds, {}) if features is None else features.show(embeds)
        found = encode_text(self.language_model, embeds, mask, position_ids, cache, **deepstack, **kwargs)
        others = (found.get(name) for name in ("hidden_states", "attentions"))
        outputs = BardVLModelOutput(found[0], cache_of(found), *others)
        return outputs if return_dict is None or return_dict else outputs.to_tuple()

    def _check_visual(
        self,
        input_ids: torch.Tensor | None,
        visual_index: torch.Tensor | None,
        tokens: torch.Tensor,
        visual_inputs: Mapping[str, torch.Tensor | None],
    ) -> None:
        """Raise `ValueError` unless the tokens, or the index beside them, say what shows each image and video."""
        if visual_index is not None:
            check_visual_inputs(self.config, None, **visual_inputs)
            check_visual_index(self.config, visual_index, tokens, visual_inputs)
        elif input_ids is not None:
            check_visual_inputs(self.config, input_ids, **visual_inputs)
        elif any(value is not None for value in visual_inputs.values()):
            raise ValueError("`inputs_embeds` do not tell which tokens show images and videos: pass `visual_index`")

    def _derived_positions(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | BlockMask | None,
        visual_inputs: Mapping[str, torch.Tensor | None],
    ) -> torch.Tensor:
        """Positions by the ids of a whole sequence; `ValueError` where there are none."""
        if input_ids is None:
            raise ValueError(
                "with cached tokens, `inputs_embeds` or `visual_index` the positions cannot be derived: pass "
                "`position_ids` (4, batch, length), for instance the last columns of `get_position_ids` of the "
                "whole sequence"
            )
        padding = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
        return self.get_position_ids(input_ids, padding, **grids_of(visual_inputs))

    def get_block_mask(
        self,
        tokens: torch.Tensor,
        cached: int,
        attention_mask: torch.Tensor | BlockMask | None,
        block_size: int | None,
        block_ids: torch.Tensor | None,
    ) -> torch.Tensor | BlockMask:
        """The 4-D mask of (batch, queries, ...) `tokens` behind `cached` keys, in the form that the attention takes."""
        implementation: Any = attention_of(self.config.text_config)
        check_attention_implementation(implementation)
        dtype = self.get_input_embeddings().weight.dtype
        batch, queries = tokens.shape[:2]
        keys = (batch, cached + queries)
        if isinstance(attention_mask, BlockMask):
            check_block_mask(attention_mask, implementation, batch, queries, cached + queries)
            return attention_mask
        if attention_mask is not None and attention_mask.ndim == 4:
            check_explicit_mask(attention_mask, batch, queries, cached + queries)
            if attention_mask.dtype != torch.bool:
                return attention_mask
            return to_attention_mask(attention_mask, implementation, dtype)
        if attention_mask is None:
            attention_mask = torch.ones(keys, dtype=torch.long, device=tokens.device)
        if attention_mask.shape != keys:
            got = tuple(attention_mask.shape)
            raise ValueError(f"`attention_mask` must be 4-D or (batch, keys) = {keys}, got shape {got}")
        if block_ids is None:
            block_ids = self._default_block_ids(attention_mask, cached, queries, block_size)
        elif block_ids.shape != keys:
            raise ValueError(f"`block_ids` must have shape (batch, keys) = {keys}, got {tuple(block_ids.shape)}")
        block_ids = block_ids.masked_fill(~attention_mask.bool(), PADDING_BLOCK)
        return to_attention_mask(block_visibility(block_ids[:, cached:], block_ids), implementation, dtype)

    def _default_block_ids(
        self, padding: torch.Tensor, cached: int, queries: int, block_size: int | None
    ) -> torch.Tensor:
        if not cached:
            return partition_prompt(padding, resolve_block_size(block_size, self.config))
        if queries > 1:
            raise ValueError(
                f"{queries} query tokens with a cache of {cached}: where their blocks begin cannot be known; pass a "
                "4-D `attention_mask`, or `block_ids` (batch, keys) for the cached and the new tokens"
            )
        return torch.zeros_like(padding)

    def get_position_ids(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Positions of (batch, length) tokens: (4, batch, length); text, temporal, height and width."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        grids = {"image_grid_thw": image_grid_thw, "video_grid_thw": video_grid_thw}
        check_visual_layout(self.config, input_ids, **grids)
        multimodal = multimodal_positions(self, input_ids, attention_mask, grids)
        text = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return torch.cat([text[None], multimodal], dim=0)

    def encode_indexed(
        self, visual_index: torch.Tensor, visual_inputs: Mapping[str, torch.Tensor | None]
    ) -> VisualFeatures | None:
        """Encode all images and videos, for tokens that say themselves which feature they show.

        Args:
            visual_index: (batch, length) row of the features, images before videos, that a token shows; -1 for none.
            visual_inputs: pixels and grids; also what no token shows is encoded, and gets gradients of zero, so that
                under data parallelism all processes train the same parameters.
        """
        items = [(pixels, grids) for _, pixels, grids, _ in visual_items(self.config, visual_inputs)]
        return VisualFeatures(visual_index, *self._run_tower(items)) if items else None

    def encode_visual(
        self, input_ids: torch.Tensor, visual_inputs: Mapping[str, torch.Tensor | None], first: int = 0
    ) -> VisualFeatures | None:
        """Encode the images and videos that have a token in column `first` or later.

        Args:
            input_ids: (batch, length) prompts; padding holds no visual token.
            visual_inputs: pixels and grids of the processor, in the order of the placeholder tokens.
            first: columns before it are already encoded.

        Returns:
            The features, or None if none is needed.
        """
        index, items, offset = torch.full_like(input_ids, -1), [], 0
        columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        for token_id, pixels, grids, counts in visual_items(self.config, visual_inputs):
            placeholder = input_ids == token_id
            item = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
            needed = item[columns[placeholder] >= first].unique()
            if not len(needed):
                continue
            keep = torch.isin(item, needed)
            patches = grids.prod(-1)
            of_patch = torch.arange(len(patches), device=patches.device).repeat_interleave(patches)
            items.append((pixels[torch.isin(of_patch, needed)], grids[needed]))
            index[placeholder] = torch.where(keep, keep.long().cumsum(0) - 1 + offset, -1)
            offset += int(counts[needed].sum())
        return VisualFeatures(index, *self._run_tower(items)) if items else None

    def _run_tower(self, items: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features of (pixels, grids) pairs in one pass, images and videos together.

        Processes that share sharded weights must run the tower equally often, whatever their prompts hold.
        """
        pixels, grids = (torch.cat(parts) for parts in zip(*items, strict=True))
        return visual_features(self, pixels, grids)


class BardVLForConditionalGeneration(BardVLGenerationMixin, PortableModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL's weights with block-causal attention, a same-position loss and block-diffusion decoding."""

    config_class = BardVLConfig
    accepts_loss_kwargs = True

    def __init__(self, config: BardVLConfig):
        # Before transformers looks for the package of an implementation that would then be refused.
        check_attention_implementation(attention_of(config.text_config) or "sdpa")
        if attention_of(config.text_config) is None:
            set_attention(config.text_config, ATTENTION_NAME)
        # Not the parent's own `__init__`, which would build a second, causal trunk first.
        super(Qwen3VLForConditionalGeneration, self).__init__(config)
        self.model = BardVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, with the code and an `auto_map` that names it for every Auto class."""
        self.config.auto_map = dict(AUTO_MAP)
        if kwargs.get("push_to_hub"):
            warn_if_seed(self.config)
        return super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Publish as transformers does; a seed is named as one."""
        warn_if_seed(self.config)
        return super().push_to_hub(*args, **kwargs)

    def get_position_ids(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See `BardVLModel.get_position_ids`."""
        return self.model.get_position_ids(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        block_size: int | None = None,
        block_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        return_dict: bool | None = None,
        visual_index: torch.Tensor | None = None,
        objective: Callable[[torch.Tensor, nn.Module], torch.Tensor] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of every token given the tokens that its block sees; the prediction at a position is of that position.

        Args:
            input_ids: (batch, length); undecided tokens hold the mask id.
            attention_mask: (batch, keys) padding mask under which attention is block-causal, or a full 4-D mask,
                boolean, additive or a `BlockMask` of FlexAttention, which is used as it is. With a cache and several
                new tokens a 4-D mask or `block_ids` is required.
            position_ids: (4, batch, length) or (3, batch, length); derived for a whole sequence.
            past_key_values, cache: two names of the keys and values of earlier tokens.
            labels: (batch, length) targets of the same positions (no shift), -100 where there is none. The loss is the
                mean over the other labels, or their sum over `num_items_in_batch`.
            block_size: tokens per block, counted from the first real token; defaults to the config's.
            block_ids: (batch, keys) block of every cached and new token; a token sees blocks up to its own.
            logits_to_keep: number of last positions (0 for all), or a 1-D tensor of the positions wanted.
            num_items_in_batch: labels in the whole batch over all accumulation steps and processes.
            visual_index: (batch, length) row of the visual features (of all images, then of all videos) that a token
                shows, -1 for none, where placeholders do not say it: several tokens may show one feature, in any order,
                and some features may be shown by none.
            objective: computes the loss from the hidden states (batch, length, hidden) after the last norm and the
                output head; no logits are returned then. It runs in here, where sharded parameters are whole.
            kwargs: `pixel_values`, `image_grid_thw`, `pixel_values_videos`, `video_grid_thw`, `use_cache`,
                `output_hidden_states`, `output_attentions`; `mm_token_type_ids` follows from the ids and is not read.

        Raises:
            ValueError: an argument is unknown, no block size is stated, the mask cannot be derived, placeholders and
                pixels differ in number, the attention implementation ignores the mask, or both `labels`
                and `objective` are given.
        """
        if objective is not None and labels is not None:
            raise ValueError("give `labels` or an `objective`, not both")
        check_tensors(labels=labels)
        kept = positions_kept(logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            block_size=block_size,
            block_ids=block_ids,
            visual_index=visual_index,
            cache=one_cache(past_key_values, cache),
            **(kwargs if objective is None else {**kwargs, "use_cache": False}),
        )
        hidden_states, loss, logits = outputs.last_hidden_state, None, None
        if objective is not None:
            loss = objective(hidden_states, self.lm_head)
        else:
            logits = self.lm_head(hidden_states[:, kept])
            if labels is not None:
                loss = same_position_loss(logits, labels[:, kept], num_items_in_batch)
        found = BardVLOutput(loss, logits, outputs.cache, outputs.hidden_states, outputs.attentions)
        return found if (self.config.return_dict if return_dict is None else return_dict) else found.to_tuple()


def positions_kept(logits_to_keep: Any) -> torch.Tensor | slice:
    """The index of the positions whose logits are wanted: a number of last ones (0 or None: all), or a list."""
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim:
        return logits_to_keep
    stated = python_value(logits_to_keep)
    if isinstance(stated, list):
        return torch.tensor(stated)
    return slice(-(check_integer("logits_to_keep", stated, minimum=0, optional=True) or 0), None)


def same_position_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy in float32 of (batch, length, vocabulary) logits with the labels of the same positions."""
    labels = labels.flatten().to(logits.device, torch.long)
    total = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum")
    count = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device)


__all__ = [
    "REMASKING_RULES",
    "BardVLCache",
    "BardVLForConditionalGeneration",
    "BardVLGenerationConfig",
    "BardVLModel",
    "BlockForm",
    "DecodingHooks",
    "Engine",
    "Form",
    "Layers",
    "Recording",
    "Rows",
    "Spelling",
    "TokenProcessors",
    "attend_slots",
]
