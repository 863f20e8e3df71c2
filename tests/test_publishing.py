"""Publishing without network: real clients upload to a Hub on this machine; what arrives is complete and loads."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh
import pytest
import tiny
from fake_hub import FakeHub, Files

pytestmark = pytest.mark.process(group="lines")

HF = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
DOWNLOAD = """
import sys, huggingface_hub
for revision in sys.argv[2:]: huggingface_hub.snapshot_download(sys.argv[1], revision=revision)
"""
MASK = tiny.IDS["small"].mask_token_id
CODE = {path.name for path in fresh.ROOT.glob("*_bard_vl.py")}
SETTINGS = {"config.json", "generation_config.json", "processor_config.json"}
PROCESSOR = {"preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
PROCESSOR |= {"vocab.json", "merges.txt"}
PAPERS = {"README.md", "LICENSE-CODE", ".gitignore"}
CONVERTED = {"model.safetensors", "chat_template.json"} | CODE | SETTINGS | PROCESSOR | PAPERS
DIRT = (
    *("__pycache__/modeling_bard_vl.cpython-311.pyc", "training/__pycache__/loss.cpython-311.pyc", "old.pyc"),
    *(
        ".pytest_cache/CACHEDIR.TAG",
        "tests/.pytest_cache/README.md",
        ".hypothesis/examples/1",
        ".mypy_cache/3.11/a.json",
    ),
    *(".ruff_cache/0.12/1", ".venv/pyvenv.cfg", ".venv/lib/python3.11/site.py", "bard_vl.egg-info/PKG-INFO"),
    *("build/lib/bard_vl/__init__.py", "dist/bard_vl-0.1.0.tar.gz", ".DS_Store", "examples/.DS_Store"),
    *(".cache/huggingface/download/config.json.lock", ".git/config"),
)


# --- what runs in a fresh process, on each line of transformers -------------------------------------------------------


def load(repo_id: str, revision: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = {"revision": revision, "trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(repo_id, dtype=torch.float32, **options)
    return model, AutoProcessor.from_pretrained(repo_id, **options)


def answer(model: Any, processor: Any) -> str:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": tiny.draw()}, {"type": "text", "text": "What?"}]}
    ]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    response = model.generate(processor.apply_chat_template(messages, **options), max_new_tokens=10)
    return processor.batch_decode(response)[0]


def answers(*revisions: list[str]) -> list[dict[str, Any]]:
    found = []
    for repo_id, revision in revisions:
        model, processor = load(repo_id, revision)
        modules = [type(model).__module__, type(processor).__module__]
        text = answer(model, processor)
        found.append({"text": text, "block size": model.config.block_size, "modules": modules})
    return found


def change_and_push(repo_id: str, revision: str, target: str) -> str:
    """Load from the Hub, change the weights, push model and processor."""
    import torch

    model, processor = load(repo_id, revision)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    model.push_to_hub(target)
    processor.push_to_hub(target)
    return answer(model, processor)


def load_root_config(root: str) -> dict[str, Any]:
    """The repository itself as a checkpoint without weights."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = AutoConfig.from_pretrained(root, trust_remote_code=True)
    references = json.loads((Path(root) / "config.json").read_text())["auto_map"]
    classes = {name: get_class_from_dynamic_module(reference, root) for name, reference in references.items()}
    module = type(config).__module__
    return {
        "module": module.partition(".")[0],
        "block size": config.block_size,
        "classes": {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in classes.items()},
    }


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module", params=fresh.LINES, ids=fresh.line_name)
def line(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_qwen3vl(tmp_path_factory.mktemp("source") / "Qwen3-VL-tiny")


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    return fresh.convert(source, source.parent / "Bard-VL-tiny", "--mask-token-id", MASK, "--block-size", 4)


def upload(hub: FakeHub, repo_id: str, folder: Path, home: Path, line: str = "") -> Files:
    """Run `hf upload` in the folder, as the manual has it; what the Hub then holds."""
    fresh.python("-c", HF, "upload", repo_id, ".", ".", home=home, cwd=folder, line=line, **hub.environment)
    return hub.files(repo_id)


def contents(folder: Path) -> Files:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def litter(folder: Path) -> None:
    """Leave the traces of work in a folder."""
    for name in DIRT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stray")


def test_upload_of_a_converted_folder_is_complete_and_clean(
    hub: FakeHub, converted: Path, line: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "folder"))
    litter(folder)
    pushed = upload(hub, f"me/littered-{fresh.line_name(line)}", folder, tmp_path / "home", line)
    assert pushed.keys() == CONVERTED
    assert pushed == contents(converted)


def test_upload_of_the_repository_is_its_files_and_no_dirt(hub: FakeHub, tmp_path: Path) -> None:
    # git reads .gitignore, also where the folder came without its history.
    subprocess.run(["git", "init", "--quiet", "--bare", tmp_path / "git"], check=True)
    listing = ["git", f"--git-dir={tmp_path / 'git'}", f"--work-tree={fresh.ROOT}", "-C", fresh.ROOT]
    listing += ["-c", "core.bare=false", "ls-files", "-z", "--others", "--exclude-standard"]
    names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    for name in names:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(fresh.ROOT / name, tmp_path / "folder" / name)
    expected = contents(tmp_path / "folder")
    litter(tmp_path / "folder")
    pushed = upload(hub, "me/repository", tmp_path / "folder", tmp_path / "home")
    assert pushed == expected
    roots = {"__init__.py", "convert_qwen3vl_to_bard.py", "pyproject.toml", "LICENSE", "README.md", ".gitignore"}
    assert {*roots, *CODE, "config.json", "generation_config.json"} <= pushed.keys()


def test_converter_pushes_what_it_wrote(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    script, output = fresh.ROOT / "convert_qwen3vl_to_bard.py", tmp_path / "out"
    options = ("--mask-token-id", MASK, "--push-to-hub", "me/converted", "--quiet")
    fresh.python(script, "--source", source, "--output", output, *options, home=tmp_path / "home", **hub.environment)
    pushed = hub.files("me/converted")
    assert pushed.keys() == CONVERTED
    assert pushed == contents(output)


@pytest.fixture(scope="module")
def revisions(hub: FakeHub, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two commits of one repository, of which the second states another block size."""
    room = tmp_path_factory.mktemp("revisions")
    folder = Path(shutil.copytree(converted, room / "folder"))
    upload(hub, "me/pinned", folder, room / "home")
    first = hub.head("me/pinned")
    config = json.loads((folder / "config.json").read_text())
    tiny.write_json(folder / "config.json", {**config, "block_size": 2})
    upload(hub, "me/pinned", folder, room / "home")
    return [first, hub.head("me/pinned")]


@pytest.fixture(scope="module")
def tuned(hub: FakeHub, revisions: list[str], line: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A repository that a model loaded from the Hub pushed itself to, and what that model says."""
    repo_id, home = f"me/tuned-{fresh.line_name(line)}", tmp_path_factory.mktemp("push")
    function, arguments = "test_publishing.change_and_push", ("me/pinned", revisions[0], repo_id)
    text = fresh.call(function, *arguments, home=home, line=line, **hub.environment)
    return {"repo_id": repo_id, "text": text}


def test_pushed_model_and_processor_carry_their_code(hub: FakeHub, converted: Path, tuned: dict[str, str]) -> None:
    by_model, by_both = list(hub.commits[tuned["repo_id"]].values())[1:]
    needed_by_model = CODE - {f"{name}_bard_vl.py" for name in ("processing", "media", "messages")}
    assert {*needed_by_model, "config.json", "generation_config.json", "model.safetensors"} <= by_model.keys()
    assert {*CODE, *PROCESSOR, "processor_config.json", "README.md"} <= by_both.keys()
    assert {name: by_both[name] for name in CODE} == {name: (converted / name).read_bytes() for name in CODE}
    expected = json.loads((fresh.ROOT / "config.json").read_text())["auto_map"]
    assert json.loads(by_both["config.json"])["auto_map"] == expected
    auto_map = json.loads(by_both["processor_config.json"])["auto_map"]
    assert auto_map == {"AutoProcessor": "processing_bard_vl.BardVLProcessor"}


def test_pinned_revisions_load_offline(
    hub: FakeHub, revisions: list[str], tuned: dict[str, str], line: str, tmp_path: Path
) -> None:
    for repo_id, wanted in (("me/pinned", [*revisions, "main"]), (tuned["repo_id"], ["main"])):
        fresh.python("-c", DOWNLOAD, repo_id, *wanted, home=tmp_path, **hub.environment)
    wanted = [["me/pinned", revisions[0]], ["me/pinned", "main"], [tuned["repo_id"], "main"]]
    pinned, newest, changed = fresh.call("test_publishing.answers", *wanted, home=tmp_path, line=line)
    assert [found["block size"] for found in (pinned, newest, changed)] == [4, 2, 4]
    assert all(f".{revisions[0]}." in module for module in pinned["modules"])
    assert all(f".{revisions[1]}." in module for module in newest["modules"])
    assert pinned["text"] != changed["text"] == tuned["text"]


def test_folder_laid_into_the_cache_by_hand_loads_too(converted: Path, line: str, tmp_path: Path) -> None:
    fresh.add_to_hub_cache(tmp_path, "me/by-hand", converted)
    by_commit, by_branch = [["me/by-hand", fresh.COMMIT], ["me/by-hand", "main"]]
    first, second = fresh.call("test_publishing.answers", by_commit, by_branch, home=tmp_path, line=line)
    assert first == second
    assert all(module.startswith("transformers_modules.") for module in first["modules"])


def test_the_repository_itself_loads_as_far_as_it_goes(line: str, tmp_path: Path) -> None:
    found = fresh.call("test_publishing.load_root_config", fresh.ROOT, home=tmp_path, line=line)
    config = json.loads((fresh.ROOT / "config.json").read_text())
    assert found["module"] == "transformers_modules"
    assert found["block size"] == config["block_size"]
    assert found["classes"] == config["auto_map"]
