"""What is tried of long comparisons: all of it by `pytest tests`, a fifth where the quick selection is asked for.

For tests of many parameters the marker `thorough(every=n)` does the same: every n-th of them is quick.
"""

QUICK = "not process and not compiled"  # the quick selection, as CONTRIBUTING.md has it
is_quick = False  # conftest.py says so, before any test is imported


def cases(count: int) -> int:
    """How many of `count` random cases to try."""
    return max(count // 5, 3) if is_quick else count


def stride(step: int = 1) -> int:
    """How far the next of many moments is from the last."""
    return step * 5 if is_quick else step
