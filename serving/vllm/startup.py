"""The set-up of vLLM for Bard-VL: required settings are made, and impossible ones are refused by name.

Most of these settings would not fail by themselves: they would give other tokens than `generate`.
"""

import logging
import math
from typing import Any

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.diffusion import DiffusionConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from .settings import read_checkpoint, stated_block_size

logger = logging.getLogger("vllm.bard_vl")

SCHEDULER = f"{__package__}.scheduler.BlockScheduler"
# Their tables grow with the pieces of a prompt; those of others have a row for each request at most.
BACKENDS = (AttentionBackendEnum.TRITON_ATTN, AttentionBackendEnum.CPU_ATTN)


def hook_configs(architecture: str) -> None:
    """Let vLLM call us when it has read its options."""
    MODELS_CONFIG_MAP[architecture] = BardVLSetup


class BardVLSetup(VerifyAndUpdateConfig):
    """vLLM's hooks for a model's config."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Read the checkpoint's settings; a request without a temperature decodes by them, greedily as a rule."""
        for notice in read_checkpoint(model_config):
            logger.warning(notice)
        settings, given = model_config.hf_config.served, model_config.override_generation_config
        defaults = {
            "temperature": 0.0,
            "top_k": None,
            "top_p": None,
            "repetition_penalty": None,
            "max_new_tokens": None,
        }
        if settings.get("temperature") or settings.get("do_sample"):
            defaults |= {name: settings.get(name) for name in ("top_k", "top_p")}
            defaults["temperature"] = settings.get("temperature", 1.0)
        # vLLM takes a stated `max_new_tokens` for a bound of all requests.
        given.update({name: value for name, value in defaults.items() if name not in given})

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Force what the plugin needs; `ValueError` names what does not go with it."""
        check_options(vllm_config)
        block_size = stated_block_size(vllm_config.model_config.hf_config)
        if vllm_config.diffusion_config is None:
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=block_size)
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        scheduler.scheduler_cls, scheduler.async_scheduling = SCHEDULER, False
        if cache.block_size is not None and cache.block_size % block_size and not cache.user_specified_block_size:
            cache.block_size, cache.user_specified_block_size = math.lcm(cache.block_size, block_size), True
        if not current_platform.is_cpu() and vllm_config.attention_config.backend is None:
            vllm_config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN


def check_options(vllm_config: VllmConfig) -> None:
    """Raise `ValueError` for an option of vLLM's under which tokens would be wrong, or that was not tried."""
    model, scheduler, parallel = vllm_config.model_config, vllm_config.scheduler_config, vllm_config.parallel_config
    cache, backend, graphs = (
        vllm_config.cache_config,
        vllm_config.attention_config.backend,
        vllm_config.compilation_config.cudagraph_mode,
    )
    size, diffusion = stated_block_size(model.hf_config), vllm_config.diffusion_config
    two = f"below two blocks, {2 * size}"
    refused = (
        ("--runner pooling", model.runner_type != "generate"),
        ("--enable-prompt-embeds", model.enable_prompt_embeds),
        ("--logits-processors", model.logits_processors),
        ("pruned videos", model.multimodal_config and model.multimodal_config.get_video_pruning_spec()),
        (f"--diffusion-config of other than {size} tokens", diffusion and diffusion.canvas_length != size),
        ("--speculative-config", vllm_config.speculative_config),
        ("--enable-lora", vllm_config.lora_config),
        ("--kv-transfer-config", vllm_config.kv_transfer_config),
        ("--kv-sharing-fast-prefill", cache.kv_sharing_fast_prefill),
        ("--scheduler-cls", scheduler.scheduler_cls not in (None, SCHEDULER)),
        ("--disable-chunked-mm-input", scheduler.disable_chunked_mm_input),
        (f"--max-num-batched-tokens {two}", scheduler.max_num_batched_tokens < 2 * size),
        (f"--long-prefill-token-threshold {two}", 0 < scheduler.long_prefill_token_threshold < 2 * size),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size > 1),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size > 1),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size > 1),
        ("--enable-batch-sharded-sampling", parallel.enable_batch_sharded_sampling),
        ("--enable-dbo", parallel.use_ubatching),
        (f"--attention-backend {backend and backend.name}", backend not in (None, *BACKENDS)),
        ("--cudagraph-mode FULL for prompts", graphs is not None and graphs.mixed_mode() == CUDAGraphMode.FULL),
    )
    for name, is_given in refused:
        if is_given:
            raise ValueError(f"Bard-VL on vLLM does not go with {name}")


def check_pages(block_size: int, page_size: int, hash_size: int) -> None:
    """Raise `ValueError` unless a page of keys and values holds whole blocks."""
    if page_size % block_size or hash_size % block_size:
        raise ValueError(
            f"--block-size {page_size} and --prefix-match-unit {hash_size}, tokens of a page, must be multiples of "
            f"{block_size}, the tokens that Bard-VL denoises together"
        )
