"""Helpers in this folder are importable by name; hypothesis draws the same examples everywhere, without a clock."""

import signal
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("repeatable")
# A shell that starts the tests in the background lets them ignore interrupts, and programs that they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
