"""The checks of requests of Bard-VL in vLLM, where requests arrive, before anything is computed."""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from ...configuration_bard_vl import BardVLConfig
from .settings import request_settings

_check_other_models = SamplingParams._validate_diffusion


def check_requests() -> None:
    """Put our check in the place of vLLM's own for diffusion models, which refuses temperatures, also 0."""
    SamplingParams._validate_diffusion = _check


def _check(params: SamplingParams, model_config: Any) -> None:
    if not isinstance(model_config.hf_config, BardVLConfig):
        _check_other_models(params, model_config)
        return
    try:
        request_settings(params, model_config.hf_config)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error
