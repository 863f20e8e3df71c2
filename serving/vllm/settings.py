"""What a checkpoint and a request ask for, in the settings of `generate`. Nothing here imports vLLM."""

import functools
from typing import Any

from ...configuration_bard_vl import BardVLConfig
from ...convert_qwen3vl_to_bard import BLOCK_SIZE_IN_NAME, PUBLISHED_THRESHOLDS, PUBLISHER
from ...generation_config_bard_vl import FIELDS, BardVLGenerationConfig, DecodingSettings, merged_settings

# What a request may state in `extra_args`, which is `vllm_xargs` in OpenAI's protocol.
OF_REQUESTS = ("confidence_threshold", "denoising_steps", "remasking_strategy", "entropy_bound", "factor")
# Settings that change tokens and that this sampler does not do, with the values by which they do not.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "revision": (),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "sequence_bias": ([],),
    "stop_strings": ("", []),
    "max_time": (),
    "seed": (),
}
# The same of vLLM's own parameters of a request.
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
    named = BLOCK_SIZE_IN_NAME.search(config._name_or_path)
    if named is None:
        raise ValueError(
            f"{config._name_or_path or 'the checkpoint'}: neither config.json nor the name states the block size that "
            """it was trained with; give it as --hf-overrides '{"block_size": 16}'"""
        )
    return int(named[1])


@functools.lru_cache(maxsize=8)
def stored_settings(folder: str, revision: str | None) -> BardVLGenerationConfig:
    """The settings in the `generation_config.json` of a folder or repository; none where there is no such file."""
    try:
        return BardVLGenerationConfig.from_pretrained(folder, revision=revision)
    except OSError:
        return BardVLGenerationConfig()


def served_settings(model_config: Any) -> dict[str, Any]:
    """The settings that requests begin with: the checkpoint's, and those of `--override-generation-config` over them.

    Args:
        model_config: vLLM's `ModelConfig`.

    Raises:
        ValueError: one of them is wrong, or changes tokens in a way that this server does not.
    """
    source = model_config.generation_config
    folder = model_config.model if source == "auto" else source
    stored = {} if source == "vllm" else stored_settings(folder, model_config.revision).explicit()
    config, name = model_config.hf_config, model_config.model
    if name.startswith(f"{PUBLISHER}/") and stated_block_size(config) in PUBLISHED_THRESHOLDS:
        stored = {"confidence_threshold": PUBLISHED_THRESHOLDS[stated_block_size(config)], **stored}
    over = {name: value for name, value in model_config.override_generation_config.items() if name in FIELDS}
    settings = merged_settings(stored, {}, {name: value for name, value in over.items() if value is not None})
    for name, neutral in NOT_SERVED.items():
        if name in settings and settings[name] not in neutral:
            raise ValueError(
                f"`{name}={settings[name]!r}` of the checkpoint's settings is not served by the vLLM plugin"
            )
    resolve(settings, config)
    return settings


def resolve(settings: dict[str, Any], config: BardVLConfig) -> DecodingSettings:
    """Check settings as `generate` does; `ValueError` names the value that is wrong."""
    named = {"block_size": stated_block_size(config), **settings}
    return DecodingSettings.resolve(BardVLGenerationConfig(**named), config, 0)


def request_settings(params: Any, model_config: Any) -> DecodingSettings:
    """The settings of a request.

    Args:
        params: vLLM's `SamplingParams`.
        model_config: vLLM's `ModelConfig`.

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
    return resolve(merged_settings(served_settings(model_config), {}, own), model_config.hf_config)
