"""Tables and plots of the study, from the JSON files of its cells alone."""

from pathlib import Path


def write_report(results: Path, scale: str, names: list[str]) -> str:
    """stub"""
    return str(sorted(results.glob("*.json")))
