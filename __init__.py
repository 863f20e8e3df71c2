"""Bard-VL: block-diffusion vision-language models on plain transformers.

Importing the package registers its classes with transformers' Auto classes, so that checkpoints that carry no code load
without `trust_remote_code`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .cache_bard_vl import BardVLCache
from .configuration_bard_vl import BardVLConfig
from .decoding_bard_vl import DenoisingStep
from .generation_bard_vl import BardVLGenerationOutput
from .generation_config_bard_vl import BardVLGenerationConfig
from .memory_bard_vl import MemoryEstimate, estimate_memory
from .modeling_bard_vl import BardVLForConditionalGeneration, BardVLModel
from .processing_bard_vl import BardVLProcessor

AutoConfig.register("bard_vl", BardVLConfig)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto_class.register(BardVLConfig, BardVLForConditionalGeneration)
AutoProcessor.register(BardVLConfig, BardVLProcessor)

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
