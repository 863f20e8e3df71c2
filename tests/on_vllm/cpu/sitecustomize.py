"""Lets vLLM's CPU build run beside packages made for CUDA; this folder on PYTHONPATH does it for every process.

PyPI's torchvision registers operators that a CPU build of torch lacks: an empty module takes that file's place. vLLM's
model runner V2 has a dozen small Triton kernels, and Triton on PyPI has no backend for a CPU: with TRITON_INTERPRET=1
it runs them by numpy, and asks a backend only whether it is there.
"""

import os
import sys
from types import ModuleType, SimpleNamespace

sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.backends

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
