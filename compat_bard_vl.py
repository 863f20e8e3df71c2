"""The names that move between releases of transformers, or are private there. Only this root file has them.

The processor's share is in processing_bard_vl.py under a heading of its own. tests/test_compat.py says in plain words
what a release broke.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig
from transformers.models.auto import modeling_auto
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer, Qwen3VLTextModel
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)

TESTED = ("4.57", "5.25")  # from the first, below the second


def warn_if_untested() -> None:
    """Say once which transformers this package was tested with, if this is another."""
    if not Version(TESTED[0]) <= Version(transformers.__version__) < Version(TESTED[1]):
        logger.warning_once(
            f"Bard-VL is tested with transformers {TESTED[0]} up to, not including, {TESTED[1]}; "
            f"this is {transformers.__version__}"
        )


warn_if_untested()

# --- the cache: `past_key_values` until 5.23, `cache` since 5.24 ------------------------------------------------------

CACHE_NAMES = ("past_key_values", "cache")
_CACHE_NAME = next(name for name in CACHE_NAMES if name in inspect.signature(Qwen3VLTextModel.forward).parameters)


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache that a call gives under either name, or None; `ValueError` if it gives two."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("`past_key_values` and `cache` are two names of one argument: give one of them")
    return cache if past_key_values is None else past_key_values


class CacheOutput(ModelOutput):
    """A model output with a field `cache`, which `past_key_values` names too."""

    cache: Any

    @property
    def past_key_values(self) -> Any:  # type: ignore[override]
        """The same as `cache`."""
        return self.cache

    def __getitem__(self, key: Any) -> Any:
        """An item by place or by name, either of the cache's."""
        return super().__getitem__(CACHE_NAMES[1] if key == CACHE_NAMES[0] else key)


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument by which transformers' own models take a cache."""
    return {_CACHE_NAME: cache}


def encode_text(
    text_model: Any, embeds: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any = None, **options: Any
) -> ModelOutput:
    """The one call of Qwen3-VL's text model.

    Args:
        text_model: a `Qwen3VLTextModel`.
        embeds: (batch, length, hidden).
        mask: as its attention implementation takes it.
        positions: (4, batch, length) or (3, batch, length).
        cache: keys and values; the new ones are written to it.
        options: further arguments of the text model and of its attention.

    Returns:
        its output; the first item is the hidden states (batch, length, hidden) after the last norm.
    """
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    return text_model(**inputs, **cache_argument(cache), **options)


def cache_of(output: ModelOutput) -> Any:
    """The cache in an output of transformers' own, or None."""
    return output.get(_CACHE_NAME)


class CheckpointedLayer(Qwen3VLTextDecoderLayer):
    """Qwen3-VL's text layer, checkpointed only where a backward pass can follow.

    Lines before 5.24 drop the cache of any layer in training mode that has gradient checkpointing.
    """

    @property
    def gradient_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether activations are computed again in the backward pass."""
        return vars(self).get("_gradient_checkpointing", False) and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.__dict__["_gradient_checkpointing"] = value


CheckpointedLayer.__name__ = Qwen3VLTextDecoderLayer.__name__  # by which device maps and sharding know the layers


class PortableModel:
    """Class attributes of models that the lines of transformers read differently."""

    base_model_prefix = "model"  # 4.57 has "" for the trunk and would silently re-initialise every weight
    _skip_keys_device_placement: ClassVar = [*CACHE_NAMES]
    _auto_class = "AutoModelForImageTextToText"  # makes `save_pretrained` copy the code, loaded as remote code or not


# --- positions and visual features ------------------------------------------------------------------------------------


def multimodal_positions(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, grids: dict[str, torch.Tensor | None]
) -> torch.Tensor:
    """(3, batch, length) temporal, height and width positions of a trunk's prompts, by its own rule."""
    types = {}
    if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:  # since 5.3
        image, video = (input_ids == token for token in (model.config.image_token_id, model.config.video_token_id))
        types["mm_token_type_ids"] = image.int() + 2 * video.int()
    return model.get_rope_index(input_ids=input_ids, attention_mask=attention_mask, **grids, **types)[0]


def visual_features(model: Any, pixels: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Embeddings and deepstack features (features, hidden) of a trunk's images or videos, in their order."""
    found = model.get_image_features(pixels, grids)
    # A tuple in transformers 4, a model output in 5. Some versions split by image, others do not.
    embeds, deepstack = found if isinstance(found, tuple) else (found.pooler_output, found.deepstack_features)
    return _joined(embeds), [_joined(layer) for layer in deepstack]


def _joined(parts: Any) -> torch.Tensor:
    return parts if isinstance(parts, torch.Tensor) else torch.cat(list(parts))


# --- attention implementations ----------------------------------------------------------------------------------------


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Let models name an attention function, to which masks are handed as they are."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Make no mask: the caller passes one to the layers that need it."""


def attention_of(config: Any) -> str | None:
    """The attention implementation of a text or vision config, None where nobody asked for one."""
    return config._attn_implementation


def set_attention(config: Any, name: str) -> None:
    """Choose the attention implementation of a text or vision config."""
    config._attn_implementation = name


# --- configs ----------------------------------------------------------------------------------------------------------


def read_rope(text: dict[str, Any]) -> None:
    """State RoPE in a text config's settings as every line reads it.

    transformers 4 spells it `rope_theta` and `rope_scaling`. 5 spells it `rope_parameters`, reads the former too, and
    has another default for theta.
    """
    rope = dict(text.pop("rope_parameters", None) or text.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or text.get("rope_theta") or 5_000_000.0
    text["rope_theta"] = float(theta)
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [24, 20, 20], **rope}


def write_rope(text: dict[str, Any]) -> None:
    """Spell RoPE in a serialised text config as every line reads it."""
    if text.get("rope_parameters"):
        rope = dict(text.pop("rope_parameters"))
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope


class SettingsFile(GenerationConfig):
    """A `GenerationConfig` that reads of its file what `read_settings` makes of it."""

    @classmethod
    def read_settings(cls, settings: dict[str, Any], json_file: Any) -> dict[str, Any]:
        """The settings that are kept in a file; all, unless a subclass says otherwise."""
        return settings

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        return cls.read_settings(super()._dict_from_json_file(json_file), json_file)


@functools.lru_cache(maxsize=1)
def plain_fields() -> dict[str, Any]:
    """The fields of a plain `GenerationConfig` and their defaults, None for most since 5.0."""
    stored = vars(GenerationConfig())
    return {name: stored[name] for name in stored if name != "transformers_version" and not name.startswith("_")}


@functools.lru_cache(maxsize=1)
def applied_defaults() -> dict[str, Any]:
    """The values that transformers uses in place of None in a plain `GenerationConfig`."""
    return getattr(GenerationConfig, "_get_default_generation_params", dict)()


@functools.lru_cache(maxsize=1)
def plain_defaults() -> dict[str, list[Any]]:
    """Values that leave a plain `GenerationConfig` field without effect: its default, and what None resolves to."""
    return {name: [value, applied_defaults().get(name)] for name, value in plain_fields().items()}


class PortableGeneration:
    """The methods that transformers calls on a model beside `generate`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, with the settings that `generation_config.json` states and no others.

        transformers loads them into its own class, whose defaults 4.57 cannot tell from what the file states. They are
        read here first: what is wrong in the file is said before any weights are read.
        """
        config = kwargs.pop("generation_config", None)
        if config is None and pretrained_model_name_or_path is not None:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            where = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            config = cls.read_generation_config(pretrained_model_name_or_path, **where)  # type: ignore[attr-defined]
        loaded = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, generation_config=config, **kwargs
        )
        if config is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).generation_config = config
        return loaded

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None = None, use_model_defaults: bool | None = None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """The settings that a pipeline of transformers 4.57 or 5.0 hands to `generate`: the model's, `kwargs` on top.

        The inherited method puts them into a plain config, which refuses fields that are unset. `generation_config`,
        the pipeline's defaults, says nothing else than the defaults of `generate`.
        """
        config = self.stored_settings()  # type: ignore[attr-defined]
        return config, config.update(**kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what would decode from left to right.

        Raises:
            ValueError: always.
        """
        raise ValueError("continuous batching is not supported by block-diffusion decoding: use `generate`")

    init_continuous_batching = continuous_batching_context_manager = generate_batch


# --- registration -----------------------------------------------------------------------------------------------------

MODEL_AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


_unpacking = threading.Lock()


def unpack_weights(model: Any) -> None:
    """Unpack weights of compressed-tensors, which wait for the first forward of the whole model.

    `generate` and `score` never call that forward, only its parts.
    """
    with _unpacking:
        waiting = getattr(model, "ct_decompress_hook", None)
        if waiting is not None:  # the hook removes itself
            model._forward_pre_hooks[waiting.id](model, ())


def name_multimodal(model_type: str, model_class: str) -> None:
    """Enter a model in the table in which `transformers serve` and the any-to-any pipeline look.

    No public call extends it, and 4.57 has none. Nothing is loaded by what it names.
    """
    getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})[model_type] = model_class


def register(config: Any, model: Any, processor: Any) -> None:
    """Register the classes with transformers' Auto classes."""
    transformers.AutoConfig.register(config.model_type, config)
    for auto_class in MODEL_AUTO_CLASSES[:3]:
        getattr(transformers, auto_class).register(config, model)
    transformers.AutoProcessor.register(config, processor)
