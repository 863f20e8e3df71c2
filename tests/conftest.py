"""Hypothesis draws the same examples everywhere, without a clock."""

import gc
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import thorough
import torch
from hypothesis import HealthCheck, settings
from PIL import ImageFile

# Results that are compared to the bit between processes need the same number of threads in each.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
settings.register_profile(
    "repeatable",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("quick", settings.get_profile("repeatable"), max_examples=20)
# A shell that starts the tests in the background lets them ignore interrupts, and programs that they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Tell the tests whether the quick selection is asked for."""
    thorough.is_quick = thorough.QUICK in config.option.markexpr
    settings.load_profile("quick" if thorough.is_quick else "repeatable")


def pytest_collection_finish() -> None:
    """Keep what all test files import out of the garbage collector's rounds, which would take longer than the tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Undo it, or extensions would report at exit what was never freed."""
    gc.unfreeze()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """The quick selection does not import files that it leaves out as a whole: their libraries take many seconds."""
    if thorough.is_quick and collection_path.suffix == ".py":
        is_left_out = "\npytestmark = pytest.mark.process" in collection_path.read_text("utf-8")
        return True if is_left_out else None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what is `thorough` out of the quick selection, and group what starts processes.

    With `-n 2 --dist loadgroup` one worker sets up what a file's processes share; single tests fill the gaps.

    Files that share the servers of `fresh.call` name a common group.
    """
    if thorough.is_quick:
        leave_out_thorough(config, items)
    for item in items:
        if marker := item.get_closest_marker("process"):
            item.add_marker(pytest.mark.xdist_group(marker.kwargs.get("group", item.path.stem)))


def leave_out_thorough(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests that are `thorough(every=n)` the first stays, and every n-th behind it."""
    turns: dict[str, Iterator[int]] = defaultdict(count)

    def is_left_out(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("thorough")
        every = marker and marker.kwargs.get("every")
        return bool(marker) and (every is None or next(turns[item.nodeid.partition("[")[0]]) % every > 0)

    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        (left_out if is_left_out(item) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.spawn")
QUICK = (("uname",), ("git",))  # the standard library asks for the processor, benchmarks ask for the commit
_unmarked: list[str] = []  # the test that runs, if it has no marker that allows it to start a process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Keep tests that start processes out of the quick selection, and so the markers true."""
    if not any(map(item.get_closest_marker, ("process", "compiled"))):
        _unmarked.append(item.nodeid)
    result = yield
    _unmarked.clear()
    return result


def refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: an unmarked test may start only the quick ones."""
    if event in STARTS and _unmarked and arguments[:1] not in QUICK:
        raise RuntimeError(f"{_unmarked[0]} starts a process ({arguments[:2]}): mark it `process` or `compiled`")


sys.addaudithook(refuse_processes)


@pytest.fixture(autouse=True)
def strict_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses half a picture, until lmms-eval, which some tests import, tells it otherwise."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
