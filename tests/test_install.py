"""Installation: pins within the stated bounds, the manual's pip lines as make targets, one range of transformers."""

import ast
import re
import runpy
import subprocess
from pathlib import Path

import bard_vl
import fresh
import pytest
from bard_vl import compat_bard_vl
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PINS = (fresh.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
CI = (fresh.ROOT / ".ci" / "run").read_text(encoding="utf-8")
PROJECT = (fresh.ROOT / "pyproject.toml").read_text(encoding="utf-8")
REQUIREMENTS = [Requirement(each) for each in re.findall(r'"([\w-]+(?:\[[\w,]+\])?[<>=~][^"]*)"', PROJECT)]
ELSEWHERE = ("setuptools", "vllm")  # builds the package; has an environment of its own
README = (fresh.ROOT / "README.md").read_text(encoding="utf-8")


def pinned() -> dict[str, Version]:
    pairs = (line.split("==") for line in PINS)
    return {canonicalize_name(name): Version(number) for name, number in pairs}


def test_constraints_are_versions_and_nothing_else() -> None:
    assert [line for line in PINS if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert "bard-vl" not in pinned()


def test_constraints_pin_what_the_package_and_its_tests_name_within_bounds() -> None:
    assert len(REQUIREMENTS) > 30
    for requirement in REQUIREMENTS:
        if requirement.name not in ELSEWHERE:
            assert pinned()[canonicalize_name(requirement.name)] in requirement.specifier, requirement.name


def test_the_bounds_of_transformers_are_what_is_tested() -> None:
    (stated,) = (each for each in REQUIREMENTS if each.name == "transformers" and not each.extras)
    oldest, bound = compat_bard_vl.TESTED
    assert {(part.operator, part.version) for part in stated.specifier} == {(">=", oldest), ("<", bound)}
    tested = [Version(number) for number in re.findall(r'"(\d+\.\d+\.\d+) \S+ \S+"', CI)] + [pinned()["transformers"]]
    assert tested == sorted(tested)
    assert tested[0].release[:2] == Version(oldest).release
    newest, first_untested = tested[-1].release, Version(bound).release
    assert (newest[0], newest[1] + 1) == first_untested[:2]


@pytest.mark.process
@pytest.mark.parametrize("target", ["describe", "test"])
def test_make_runs_the_manuals_lines(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", "VENV=room", target]
    steps = subprocess.run(command, cwd=fresh.ROOT, capture_output=True, text=True, check=True).stdout
    steps = steps.replace("room/bin/", "").replace(" --quiet", "")
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) if MARKS[target] in block]
    for line in block.splitlines():
        if not line.startswith(("bard-vl run", "pytest tests -m")):  # a picture of one's own; a choice
            assert f"\n{line}\n" in steps
    assert f"```bash\nmake {target}\n```" in README
    assert f'stage "{"make describe" if target == "describe" else "all tests"}" make {target}' in CI


MARKS = {"describe": "python examples/describe.py", "test": "\npytest tests\n"}


def test_the_page_of_a_package_index_has_what_it_can_show() -> None:
    page = runpy.run_path(str(fresh.ROOT / "setup.py"))["page"]()
    assert page.lstrip().startswith("# Bard-VL")
    assert re.findall(r"\]\((?!https?:)", page) == []
    assert "[paper](https://arxiv.org/abs/2604.16514)" in page
    assert "docs/generation.md" in page


def test_modules_of_the_wheel_import_only_modules_of_the_wheel() -> None:
    packages = ast.literal_eval(re.findall(r"^packages = (\[.*\])$", PROJECT, flags=re.MULTILINE)[0])
    folders = {
        package: fresh.ROOT / "cli" if package == "bard_vl_cli" else fresh.ROOT.joinpath(*package.split(".")[1:])
        for package in packages
    }
    files = [(package, path) for package, folder in folders.items() for path in folder.glob("*.py")]
    known = {*packages, *(f"{package}.{path.stem}" for package, path in files)}
    for package, path in files:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names if alias.name.startswith("bard_vl")}
            elif isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("bard_vl")):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                imported.add(".".join([*above, *([node.module] if node.module else [])]))
        assert imported <= known, path


def test_the_small_checkpoint_and_the_recipes_are_in_the_wheel() -> None:
    from bard_vl.app.checkpoints import EMBEDDED

    files = PROJECT.partition("[tool.setuptools.package-data]")[2]
    for pattern in ("examples/checkpoint/*", "examples/images/*", "recipes/*.yaml", "recipes/accelerate/*.yaml"):
        assert f'"{pattern}"' in files
    assert Path(bard_vl.__file__).resolve().parent / "examples" / "checkpoint" == EMBEDDED


def test_the_version_is_the_packages() -> None:
    assert f'\nversion = "{bard_vl.__version__}"\n' in PROJECT
