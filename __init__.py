"""Bard-VL: block-diffusion vision-language models on plain transformers.

Importing the package registers its classes with transformers' Auto classes, so that checkpoints that carry no code load
without `trust_remote_code`.
"""

from .cache_bard_vl import BardVLCache
from .compat_bard_vl import register
from .configuration_bard_vl import BardVLConfig
from .decoding_bard_vl import DenoisingStep
from .generation_bard_vl import BardVLGenerationOutput
from .generation_config_bard_vl import BardVLGenerationConfig
from .memory_bard_vl import MemoryEstimate, estimate_memory
from .modeling_bard_vl import BardVLForConditionalGeneration, BardVLModel
from .processing_bard_vl import BardVLProcessor

register(BardVLConfig, BardVLForConditionalGeneration, BardVLProcessor)

__version__ = "0.1.0"
__all__ = [
    "BardVLCache",
    "BardVLConfig",
    "BardVLForConditionalGeneration",
    "BardVLGenerationConfig",
    "BardVLGenerationOutput",
    "BardVLModel",
    "BardVLProcessor",
    "DenoisingStep",
    "MemoryEstimate",
    "estimate_memory",
]
