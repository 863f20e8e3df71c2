"""Bard-VL on vLLM: a plugin, found by its entry point, that changes nothing of vLLM's for other models.

See docs/serving.md. `register` runs in every process that vLLM starts.
"""

from importlib.metadata import version
from typing import Any

from ...configuration_bard_vl import BardVLConfig
from .settings import stated_block_size

ARCHITECTURE = "BardVLForConditionalGeneration"
TESTED = "0.32"  # the minor version of vLLM that this was tested with


def register() -> None:
    """Register Bard-VL with vLLM; with another minor version, what refuses to serve it."""
    import vllm

    BardVLConfig.canvas_length = property(canvas_length(vllm.__version__))  # type: ignore[attr-defined]
    if is_tested(vllm.__version__):
        from vllm import ModelRegistry

        from .requests import check_requests
        from .startup import hook_configs

        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
        hook_configs(ARCHITECTURE)
        check_requests()


def is_tested(installed: str) -> bool:
    """Whether this is vLLM's minor version that the plugin was tested with."""
    return installed.split(".")[:2] == TESTED.split(".")


def canvas_length(installed: str) -> Any:
    """The getter of the number by which vLLM knows a config as that of a diffusion model: tokens of a block.

    Every use of such a config asks for it: where vLLM is another version, that says so.
    """

    def get(config: BardVLConfig) -> int:
        if not is_tested(installed):
            raise ValueError(
                f"bard-vl {version('bard-vl')} serves Bard-VL by vLLM {TESTED}, this is vLLM {installed}: other "
                f"versions can give wrong tokens silently. `pip install 'bard-vl[vllm]'` takes the right one"
            )
        return stated_block_size(config)

    return get


__all__ = ["register"]
