"""Helpers in this folder are importable by name; hypothesis draws the same examples everywhere, without a clock."""

import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from PIL import ImageFile

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("repeatable")
# A shell that starts the tests in the background lets them ignore interrupts, and programs that they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def strict_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses half a picture, until lmms-eval, which some tests import, tells it otherwise."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
