"""Helpers in this folder are importable by name; hypothesis draws the same examples everywhere, without a clock."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import ImageFile

# What is compared to the bit between processes has to be computed by as many threads in each.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("repeatable")
# A shell that starts the tests in the background lets them ignore interrupts, and programs that they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep what all test files import out of the garbage collector's rounds, which would take longer than the tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Undo it, or extensions would report at exit what was never freed."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def strict_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses half a picture, until lmms-eval, which some tests import, tells it otherwise."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
