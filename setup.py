"""Metadata that pyproject.toml cannot express: a package index shows the README without what only a repository has."""

import re
from pathlib import Path

from setuptools import setup


def page() -> str:
    """README.md without the Hub's metadata, pictures and links into the repository."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


if __name__ == "__main__":
    setup(long_description=page(), long_description_content_type="text/markdown")
