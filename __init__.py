"""Bard-VL: block-diffusion vision-language models on plain transformers.

Importing the package registers its classes with transformers' Auto classes, so that checkpoints that carry no code load
without `trust_remote_code`.
"""

from .app.chats import check_chat, is_text
from .app.checkpoints import complete_settings, read_config
from .app.devices import find_device
from .app.errors import UsageError, one_line
from .app.memory import MemoryEstimate, estimate_memory
from .app.session import Session
from .app.terminal import DraftStreamer
from .cache_bard_vl import BardVLCache
from .compat_bard_vl import register
from .configuration_bard_vl import BardVLConfig
from .engine_bard_vl import DenoisingStep
from .generation_bard_vl import BardVLGenerationOutput
from .generation_config_bard_vl import BardVLGenerationConfig
from .media_bard_vl import read_picture
from .modeling_bard_vl import BardVLForConditionalGeneration, BardVLModel
from .processing_bard_vl import BardVLProcessor

register(BardVLConfig, BardVLForConditionalGeneration, BardVLProcessor)

__version__ = "0.2.0"
__all__ = [
    "BardVLCache",
    "BardVLConfig",
    "BardVLForConditionalGeneration",
    "BardVLGenerationConfig",
    "BardVLGenerationOutput",
    "BardVLModel",
    "BardVLProcessor",
    "DenoisingStep",
    "DraftStreamer",
    "MemoryEstimate",
    "Session",
    "UsageError",
    "check_chat",
    "complete_settings",
    "estimate_memory",
    "find_device",
    "is_text",
    "one_line",
    "read_config",
    "read_picture",
]
