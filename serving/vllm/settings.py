"""The settings of `generate` that a checkpoint and a request ask for. Nothing here imports vLLM."""

from typing import Any

from ...app.checkpoints import complete_settings, last_part, stored_settings
from ...configuration_bard_vl import BardVLConfig
from ...convert_qwen3vl_to_bard import named_block_size
from ...generation_config_bard_vl import FIELDS, SETTINGS, BardVLGenerationConfig, DecodingSettings, merged_settings
from ...remasking_bard_vl import REMASKING_RULES

# The settings that a request may state in `extra_args`, which is `vllm_xargs` in OpenAI's protocol.
BOUNDS = tuple(dict.fromkeys(rule.bound for rule in REMASKING_RULES.values()))
OF_REQUESTS = ("denoising_steps", "remasking_strategy", *BOUNDS)
# vLLM's own parameters of a request that this sampler does not heed, with the values by which they ask for nothing.
NOT_TAKEN: dict[str, tuple[Any, ...]] = {
    "min_p": (0.0,),
    "min_tokens": (0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "structured_outputs": (None,),
    "thinking_token_budget": (None,),
}


def stated_block_size(config: BardVLConfig) -> int:
    """The block size of a checkpoint by its config, else by its name; `ValueError` if neither states it."""
    if config.block_size is not None:
        return config.block_size
    named = named_block_size(last_part(config._name_or_path))
    if named is None:
        raise ValueError(
            f"{config._name_or_path or 'the checkpoint'}: neither config.json nor the name states the block size that "
            """it was trained with; give it as --hf-overrides '{"block_size": 16}'"""
        )
    return named


def read_checkpoint(model_config: Any) -> list[str]:
    """Note in the checkpoint's config what requests begin with; what to tell the operator.

    That is what the checkpoint's files and name say, and `--override-generation-config` over it.

    Args:
        model_config: vLLM's `ModelConfig`.

    Raises:
        ValueError: a setting is wrong, or changes tokens in a way that this server does not.
    """
    config, source = model_config.hf_config, model_config.generation_config
    config.block_size = stated_block_size(config)
    where = {"revision": model_config.revision} if model_config.revision else {}
    folder = model_config.model if source == "auto" else source
    stored = None if source == "vllm" else stored_settings(folder, **where)
    given = {name: value for name, value in model_config.override_generation_config.items() if name in FIELDS}
    over = {name: value for name, value in given.items() if value is not None}
    merged = merged_settings(stored.explicit() if stored else {}, {}, over)
    for name, value in merged.items():
        if "vllm" not in SETTINGS[name].reaches and value not in SETTINGS[name].off:
            raise ValueError(f"`{name}={value!r}` of the checkpoint's settings is not served by the vLLM plugin")
    completed, notices = complete_settings(model_config.model, config, BardVLGenerationConfig(**merged), **where)
    config.served = completed.explicit()
    resolve(config.served, config)
    return notices


def resolve(settings: dict[str, Any], config: BardVLConfig) -> DecodingSettings:
    """Check settings as `generate` does; `ValueError` names the value that is wrong."""
    named = {"block_size": stated_block_size(config), **settings}
    return DecodingSettings.resolve(BardVLGenerationConfig(**named), config, 0)


def request_settings(params: Any, config: BardVLConfig) -> DecodingSettings:
    """The settings of a request.

    Args:
        params: vLLM's `SamplingParams`.
        config: of a checkpoint that `read_checkpoint` has read.

    Raises:
        ValueError: one of them is wrong, or asks for something that this sampler does not do.
    """
    for name, neutral in NOT_TAKEN.items():
        value = getattr(params, name, None)
        if value not in neutral:
            raise ValueError(f"`{name}={value!r}` is not supported by block-diffusion decoding in vLLM")
    extra = params.extra_args or {}
    unknown = sorted(extra.keys() - {*OF_REQUESTS})
    if unknown:
        raise ValueError(f"a request may set {', '.join(OF_REQUESTS)}, got {', '.join(unknown):.80}")
    own = {"temperature": params.temperature, "top_k": max(params.top_k, 0), "top_p": params.top_p, **extra}
    return resolve(merged_settings(config.served, {}, own), config)
