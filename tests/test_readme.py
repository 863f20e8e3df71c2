"""The manual is executed: every command and every snippet, as printed, against a fake Hub cache of tiny checkpoints."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest
import yaml
from tiny import draw_scene, write_qwen3vl

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
GENERATION, CONVERTING = (
    (REPOSITORY / "docs" / name).read_text("utf-8") for name in ("generation.md", "converting.md")
)
MANUAL = "\n".join([README, GENERATION, CONVERTING])  # their snippets follow each other
CI = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
PUBLISHED = "fudan-generative-ai/Bard-VL-B16-Mask-4B-Distil-Instruct"
TRAINED = "fudan-generative-ai/Bard-VL-B4-Mask-2B-Instruct"  # where the recipe of the manual starts
PINNED = "0123456789abcdef0123456789abcdef01234567"
TRAINING = "python -m bard_vl.training.merge_blocks"
SETUP = ("make ", "pip install", "pytest")  # what CI runs by make: see test_install.py
CHAT = [
    {"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
]
# Replaces the uploader, and the uploader alone, in the processes of the commands.
STUB_UPLOADER = """
import os, huggingface_hub
def upload_folder(self, *, repo_id, folder_path, **kwargs):
    with open(os.environ["UPLOADS"], "a") as log:
        print(repo_id, sorted(os.listdir(folder_path)), file=log)
    return "https://huggingface.co/" + repo_id
for name in ("upload_folder", "upload_large_folder"):
    if hasattr(huggingface_hub.HfApi, name):
        setattr(huggingface_hub.HfApi, name, upload_folder)
def create_repo(self, repo_id, **kwargs):
    return huggingface_hub.RepoUrl("https://huggingface.co/" + repo_id)
huggingface_hub.HfApi.create_repo = create_repo
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", MANUAL, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def add_to_hub_cache(cache: Path, repo_id: str, folder: Path, commit: str) -> None:
    """Lay a folder into the cache as `snapshot_download` would have."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)


def make_published(qwen: Path, folder: Path) -> Path:
    """A checkpoint as published: Bard-VL's model types, no code, neither block size nor mask id."""
    shutil.copytree(qwen, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bard_vl", "architectures": ["BardVLForConditionalGeneration"]}
    config["text_config"]["model_type"] = "bard_vl_text"
    config["vision_config"]["model_type"] = "bard_vl"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with a picture in it, beside a Hub cache that holds what the manual names."""
    root = tmp_path_factory.mktemp("readme")
    checkout, cache = root / "checkout", root / "hub"
    checkout.mkdir()
    for path in [
        *REPOSITORY.glob("*.py"),
        *REPOSITORY.glob("*.json"),
        REPOSITORY / "LICENSE",
        REPOSITORY / "model_card.md",
    ]:
        shutil.copy(path, checkout)
    for folder in ("examples", "training"):
        shutil.copytree(REPOSITORY / folder, checkout / folder)
    draw_scene(checkout / "photo.jpg")
    (checkout / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    qwen = write_qwen3vl(root / "qwen", tokenizer="qwen")
    add_to_hub_cache(cache, "Qwen/Qwen3-VL-4B-Instruct", qwen, "a" * 40)
    published = make_published(qwen, root / "published")
    settings = json.loads((published / "generation_config.json").read_text())
    (published / "generation_config.json").write_text(json.dumps({**settings, "max_new_tokens": 20}))
    for name in (PUBLISHED, TRAINED):
        add_to_hub_cache(cache, name, published, "b" * 40)
    (root / "stub").mkdir()
    (root / "stub" / "sitecustomize.py").write_text(STUB_UPLOADER)
    for command in commands():
        if command.startswith("python convert"):
            run(checkout, *shlex.split(command)[1:])
    add_to_hub_cache(cache, "your-name/Bard-VL-4B", checkout / "Bard-VL-4B", PINNED)
    return checkout


def run(checkout: Path, *arguments: str, script: str | None = None, **variables: str) -> str:
    """Run Python in the checkout, offline, with the fake cache and the stubbed uploader."""
    root = checkout.parent
    paths = filter(None, [str(root / "stub"), os.environ.get("PYTHONPATH")])
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "UPLOADS": str(root / "uploads"),
        "PYTHONPATH": os.pathsep.join(paths),
        **variables,
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_is_run_here_or_by_ci() -> None:
    for command in commands():
        known = command.startswith(("python convert", "python examples/", "bard-vl run", TRAINING, "hf upload", *SETUP))
        assert known, f"no test runs: {command}"
        if command.startswith("pip install") and "[" in command:  # CI installs the tests' extra, which has the others
            assert f"{command[command.index('[') + 1 : command.index(']')]}" in extras_of_tests()
    languages = set(re.findall(r"^```(\w+)", MANUAL, flags=re.MULTILINE))
    assert languages == {"bash", "python"}
    assert "@article{" in (REPOSITORY / "CITATION.bib").read_text(encoding="utf-8")


def test_the_readme_is_short_and_leads_somewhere() -> None:
    assert len(README.splitlines()) <= 130
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (REPOSITORY / target).exists(), target


def test_the_table_of_checkpoints_is_the_codes() -> None:
    from bard_vl_cli.models import PUBLISHED, WEIGHTS

    for each in PUBLISHED:
        sizes = " | ".join(f"{gigabytes} GB" for gigabytes in WEIGHTS[each.size].values())
        link = f"[{each.name.rpartition('/')[2]}](https://huggingface.co/{each.name})"
        assert f"| {link} | {each.block_size} | {each.threshold or '-'} | {sizes} |" in README


def extras_of_tests() -> set[str]:
    """Extras of the package that its tests install."""
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    others = re.search(r'^test = .*"bard-vl\[([\w,]+)\]"', project, flags=re.MULTILINE)
    assert others
    return {"test", *others[1].split(",")}


def test_tables_name_every_setting_and_every_file() -> None:
    from bard_vl.generation_config_bard_vl import settings_table

    table = settings_table().replace("](docs/", "](")  # as the page, which is in that folder, links
    assert f"\n\n{table}\n\n" in GENERATION
    rows = re.findall(r"^\| (`.*?`) \|", CONVERTING, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named >= {path.name for path in REPOSITORY.glob("*_bard*.py")}


def refuse(event: str, arguments: Any) -> None:
    writes = event == "open" and any(letter in str(arguments[1]) for letter in "wax+")
    if event.startswith("socket.connect") or (writes and str(arguments[0]).endswith((".py", ".json", ".txt"))):
        raise RuntimeError(f"{event} {arguments}")


def import_while_watched() -> bool:
    """In a process that has imported transformers and not yet this package."""
    known = "bard_vl" in sys.modules
    sys.addaudithook(refuse)
    import bard_vl  # noqa: F401

    return known


@pytest.mark.process(group="lines")
def test_code_neither_connects_nor_writes_at_import(tmp_path: Path) -> None:
    assert fresh.call("test_readme.import_while_watched", home=tmp_path, package=True) is False


def test_converted_folders_are_what_the_manual_says(checkout: Path) -> None:
    ready, seed = (
        json.loads((checkout / name / "config.json").read_text()) for name in ("Bard-VL-4B", "Bard-VL-4B-seed")
    )
    assert (ready["block_size"], seed["block_size"]) == (16, 4)
    assert ("trained" in ready, seed["trained"]) == (False, False)
    settings = json.loads((checkout / "Bard-VL-4B" / "generation_config.json").read_text())
    assert settings["confidence_threshold"] == 0.5, "as the authors recommend"


def test_example_describes_its_own_picture(checkout: Path) -> None:
    (command,) = [command for command in commands() if command.startswith("python examples/describe.py")]
    output = run(checkout, *shlex.split(command)[1:])
    assert output.startswith("There are ")
    assert re.search(r"\d+ forwards, \d+\.\d\d tokens per forward\n$", output)


def test_command_line_describes_a_picture(checkout: Path) -> None:
    described, filled = [command for command in commands() if command.startswith("bard-vl run")]
    output = run(checkout, "-m", "bard_vl_cli", *shlex.split(described)[1:], "--max-new-tokens", "20", "--json")
    answer = json.loads(output)
    assert answer["model"] == PUBLISHED
    assert answer["num_tokens"] <= 20
    output = run(checkout, "-m", "bard_vl_cli", *shlex.split(filled)[1:])
    assert f"prints `{output.strip()}`" in README


def test_training_leaves_a_checkpoint(checkout: Path) -> None:
    (command,) = [command for command in commands() if command.startswith(TRAINING)]
    run(checkout, *shlex.split(command)[1:], "--use_cpu", "true", "--max_steps", "1")
    assert json.loads((checkout / "finetuned" / "block-4" / "config.json").read_text())["block_size"] == 4


def test_snippets_run_in_order(checkout: Path) -> None:
    python = blocks("python")
    assert len(python) >= 7
    # What compiles is shown by test_compilation.py, and would take longer than all of these.
    output = run(checkout, "-", script="\n".join(python), TORCHDYNAMO_DISABLE="1")
    encoded, total = re.search(r"tensor\(\[(\d+)\]\) of (\d+) prompt tokens encoded", output).groups()
    assert int(encoded) < int(total)


def test_upload_command_pushes_the_converted_folder(checkout: Path) -> None:
    (command,) = [command for command in commands() if command.startswith("hf upload")]
    cli = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
    run(checkout, "-c", cli, *shlex.split(command)[1:])
    pushed = (checkout.parent / "uploads").read_text()
    assert pushed.startswith("your-name/Bard-VL-4B")
    for name in ("README.md", "config.json", "model.safetensors", "modeling_bard_vl.py", "processing_bard_vl.py"):
        assert f"'{name}'" in pushed


def test_card_header_is_valid_for_the_hub() -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(README, ignore_metadata_errors=False)
    header = yaml.safe_load(README.split("---")[1])
    assert header.keys() >= {"license", "library_name", "pipeline_tag", "base_model", "tags"}
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "mit"
    assert "custom_code" in card.data.tags
