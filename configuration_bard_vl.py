"""Configuration of Bard-VL: Qwen3-VL's, plus the block size trained with and the id of the mask token."""

from typing import Any, ClassVar

from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.utils import logging

from .compat_bard_vl import CACHE_NAMES, name_multimodal, read_rope, write_rope

logger = logging.get_logger(__name__)
name_multimodal("bard_vl", "BardVLForConditionalGeneration")

DEFAULT_MASK_TOKEN_ID = 151671  # an unused embedding row of the Qwen3-VL vocabulary; the published checkpoints' choice


def _to_mutable_dict(config: Any) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else dict(config or {})


class BardVLConfig(Qwen3VLConfig):
    """Qwen3-VL configuration with the two facts that block diffusion adds (arXiv 2604.16514).

    Args:
        text_config, vision_config (`dict` or config object, *optional*):
            As in `Qwen3VLConfig`. The sub-config model types of published checkpoints (`bard_vl_text`, `bard_vl`) are
            read as Qwen3-VL's.
        block_size (`int`, *optional*):
            Tokens per block that the weights were trained with. Published checkpoints do not state it; `forward` and
            `generate` then ask for it.
        mask_token_id (`int`, defaults to 151671):
            Id that stands for an undecided token. It is checked against the vocabulary when it is first used.
        kwargs:
            As in `Qwen3VLConfig`; and `trained`, of which `False` marks a seed: weights of an autoregressive model that
            have not been trained for block diffusion. Training drops the mark.

    Raises:
        ValueError: `block_size` is no positive integer, or `mask_token_id` no non-negative one.
    """

    model_type = "bard_vl"
    keys_to_ignore_at_inference: ClassVar = [*CACHE_NAMES]  # of an output: the Trainer gathers the others

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        block_size: int | None = None,
        mask_token_id: int = DEFAULT_MASK_TOKEN_ID,
        **kwargs: Any,
    ):
        self.block_size = check_integer("block_size", block_size, minimum=1, optional=True)
        self.mask_token_id = check_integer("mask_token_id", mask_token_id, minimum=0)

        text, vision = _to_mutable_dict(text_config), _to_mutable_dict(vision_config)
        # A model type of our own would need Auto classes of its own for the parts, which are Qwen3-VL's unchanged.
        text.pop("model_type", None)
        vision.pop("model_type", None)
        read_rope(text)
        # transformers 4 ties by the text config, 5 by the outer one: both get the same answer.
        tie = text.get("tie_word_embeddings")
        tie = kwargs.pop("tie_word_embeddings", False) if tie is None else tie
        kwargs["tie_word_embeddings"] = text["tie_word_embeddings"] = tie
        super().__init__(text_config=text, vision_config=vision, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Serialise with RoPE in the spelling that transformers 4 and 5 both read."""
        output = super().to_dict()
        text = output.get("text_config")
        if isinstance(text, dict):
            write_rope(text)
            text["tie_word_embeddings"] = output["tie_word_embeddings"] = self.tie_word_embeddings
        return output


def check_integer(name: str, value: Any, *, minimum: int, optional: bool = False) -> Any:
    """Return `value` if it is an integer of at least `minimum` (or None where `optional`), else raise `ValueError`."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}")
    return value


def warn_if_seed(config: Any) -> None:
    """Say once that a model has not been trained for block diffusion."""
    if getattr(config, "trained", None) is False:
        logger.warning_once(
            "This model is a seed: its weights come from an autoregressive model and have not been trained for block "
            "diffusion, so it writes nonsense. Its config.json says so by `trained`, which training removes."
        )


__all__ = ["BardVLConfig"]
