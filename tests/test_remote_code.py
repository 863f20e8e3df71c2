"""One checkpoint, two ways in: `import bard_vl` registers it, or the files beside its weights run as remote code."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest
import tiny

pytestmark = pytest.mark.process(group="lines")

MASK = tiny.IDS["small"].mask_token_id
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
MODEL_CLASS = "BardVLForConditionalGeneration"
CODE = sorted(path.name for path in fresh.ROOT.glob("*_bard_vl.py"))


# --- what runs in a fresh process, on each line of transformers -------------------------------------------------------


def auto(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def generate(model: Any) -> list[int]:
    import torch

    ids = torch.arange(20, 29)[None]
    return model.generate(ids, max_new_tokens=12, block_size=4, mask_token_id=MASK, confidence_threshold=0.3)[
        0
    ].tolist()


def image_tokens(processor: Any) -> list[int]:
    return processor(text="<|image_pad|>", images=[tiny.draw()])["input_ids"]


def load_by_package(published: str) -> dict[str, Any]:
    import bard_vl
    import torch

    models = {name: auto(name).from_pretrained(published, dtype=torch.float32) for name in AUTO_CLASSES}
    attention = auto(AUTO_CLASSES[-1]).from_pretrained(published, _attn_implementation="sdpa")
    config = auto("AutoConfig").from_pretrained(published)
    own = bard_vl.BardVLProcessor.from_pretrained(published)
    return {
        "models": {name: type(model) is bard_vl.BardVLForConditionalGeneration for name, model in models.items()},
        "config": type(config) is bard_vl.BardVLConfig,
        "parts": [type(config.text_config).__name__, type(config.vision_config).__name__],
        "attention": attention.config._attn_implementation,
        "processor": type(auto("AutoProcessor").from_pretrained(published)).__name__,
        "own processor": [type(own).__name__, own.tokenizer.padding_side],
        "image tokens": image_tokens(own),
        "ids": [generate(model) for model in models.values()],
    }


def save_by_package(published: str, target: str) -> list[int]:
    import bard_vl
    import torch

    model = auto("AutoModelForImageTextToText").from_pretrained(published, dtype=torch.float32)
    model.save_pretrained(target)
    bard_vl.BardVLProcessor.from_pretrained(published).save_pretrained(target)
    return generate(model)


def load_registered_processor(folder: str) -> list[str]:
    processor = auto("AutoProcessor").from_pretrained(folder)
    return [type(processor).__module__, type(processor).__name__]


def use_the_package(published: str, nameless: str, target: str) -> dict[str, Any]:
    loaded = load_by_package(published)
    return {
        **loaded,
        "registered processor": load_registered_processor(nameless),
        "saved ids": save_by_package(published, target),
    }


def load_as_remote_code(folder: str) -> tuple[Any, Any]:
    import torch

    options = {"trust_remote_code": True, "dtype": torch.float32}
    model = auto("AutoModelForImageTextToText").from_pretrained(folder, **options)
    return model, auto("AutoProcessor").from_pretrained(folder, trust_remote_code=True)


def answer_as_remote_code(folder: str) -> list[int]:
    return generate(load_as_remote_code(folder)[0])


def code_file(instance: Any) -> str:
    return sys.modules[type(instance).__module__].__file__ or ""


def load_and_save(folder: str, target: str, published: str) -> dict[str, Any]:
    """Load by every Auto class, take one training step, save."""
    import torch

    options = {"trust_remote_code": True, "dtype": torch.float32, "_attn_implementation": "sdpa"}
    models = {name: auto(name).from_pretrained(folder, **options) for name in AUTO_CLASSES}
    model, processor = load_as_remote_code(folder)
    config = auto("AutoConfig").from_pretrained(folder, trust_remote_code=True)
    instances = [*models.values(), model, processor, config]
    found = {
        "models": [type(model).__name__ for model in models.values()],
        "others": [type(processor).__name__, type(config).__name__],
        "modules": [type(instance).__module__ for instance in instances],
        "files": [code_file(instance) for instance in instances],
        "image tokens": image_tokens(processor),
        "ids": [generate(model) for model in models.values()],
        "without code or package": refusal(published),
    }
    train(model)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return {**found, "trained ids": generate(model)}


def refusal(published: str) -> str:
    try:
        auto("AutoConfig").from_pretrained(published)
    except ValueError as error:
        return str(error)
    return ""


def train(model: Any) -> None:
    """One large step, so that greedy decoding notices."""
    import torch

    ids = torch.randint(20, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    model.train()(input_ids=ids, labels=ids, block_size=4, use_cache=False).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.eval()


def load_and_save_again(*folders: str) -> list[dict[str, Any]]:
    """Load what was saved, also after one more round."""
    found = []
    for folder in folders:
        model, processor = load_as_remote_code(folder)
        model.save_pretrained(f"{folder}-again")
        processor.save_pretrained(f"{folder}-again")
        copy, _ = load_as_remote_code(f"{folder}-again")
        found.append({"ids": [generate(model), generate(copy)], "image tokens": image_tokens(processor)})
    return found


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as published: Bard-VL's model types on every level, no code, neither block size nor mask id."""
    folder = tiny.write_qwen3vl(tmp_path_factory.mktemp("published") / "Bard-VL-B4-Mask-tiny")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bard_vl", "architectures": [MODEL_CLASS]}
    config["text_config"]["model_type"] = "bard_vl_text"
    config["vision_config"]["model_type"] = "bard_vl"
    tiny.write_json(folder / "config.json", config)
    return folder


@pytest.fixture(scope="module")
def repository(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with the code beside it."""
    output = tmp_path_factory.mktemp("repository") / "with-code"
    return fresh.convert(published, output, "--mask-token-id", MASK, "--block-size", 4)


@pytest.fixture(scope="module", params=fresh.LINES, ids=fresh.line_name)
def line(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def nameless(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint without weights, whose files name no class of a processor."""
    folder = tmp_path_factory.mktemp("nameless") / "folder"
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("processor_class")
        tiny.write_json(folder / name, settings)
    return folder


@pytest.fixture(scope="module")
def packages(published: Path, nameless: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Per line: what the package did there in one process, and the folder that it saved."""
    results = {}
    for line in fresh.LINES:
        room = tmp_path_factory.mktemp("package")
        target, options = room / f"packaged-by-{fresh.line_name(line)}", {"home": room / "home", "line": line}
        arguments = (published, nameless, target)
        results[line] = fresh.call("test_remote_code.use_the_package", *arguments, **options, package=True)
        results[line] |= {"folder": target}
    return results


@pytest.fixture
def by_package(packages: dict[str, dict[str, Any]], line: str) -> dict[str, Any]:
    return packages[line]


@pytest.fixture(scope="module")
def saved(repository: Path, published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Per line: what remote code did there, and the folder that it saved; its source is gone."""
    results = {}
    for line in fresh.LINES:
        room = tmp_path_factory.mktemp("remote")
        source = shutil.copytree(repository, room / "source")
        target = room / f"saved-by-{fresh.line_name(line)}"
        function, home = "test_remote_code.load_and_save", room / "home"
        results[line] = fresh.call(function, source, target, published, home=home, line=line)
        results[line] |= {"home": home, "folder": target}
        shutil.rmtree(source)
    return results


def test_code_less_checkpoint_loads_after_import(by_package: dict[str, Any]) -> None:
    assert by_package["models"] == dict.fromkeys(AUTO_CLASSES, True)
    assert by_package["config"] is True
    assert by_package["parts"] == ["Qwen3VLTextConfig", "Qwen3VLVisionConfig"]
    assert by_package["attention"] == "sdpa"


def test_code_less_checkpoint_has_the_stock_processor_by_auto_and_its_own_by_name(by_package: dict[str, Any]) -> None:
    assert by_package["processor"] == "Qwen3VLProcessor"
    assert by_package["own processor"] == ["BardVLProcessor", "left"]


def test_auto_processor_is_registered_where_the_folder_names_none(by_package: dict[str, Any]) -> None:
    assert by_package["registered processor"] == ["bard_vl.processing_bard_vl", "BardVLProcessor"]


def test_code_beside_the_weights_is_what_runs(saved: dict[str, dict[str, Any]], line: str) -> None:
    found = saved[line]
    assert found["models"] == [MODEL_CLASS] * len(AUTO_CLASSES)
    assert found["others"] == ["BardVLProcessor", "BardVLConfig"]
    assert all(module.startswith("transformers_modules.source.") for module in found["modules"])
    assert all(Path(path).is_relative_to(found["home"]) for path in found["files"])
    assert "`bard_vl`" in found["without code or package"]


def test_package_and_remote_code_generate_the_same(
    by_package: dict[str, Any], saved: dict[str, dict[str, Any]], line: str
) -> None:
    assert by_package["ids"] == saved[line]["ids"]
    assert by_package["ids"] == [saved[""]["ids"][0]] * len(AUTO_CLASSES)
    assert by_package["image tokens"] == saved[line]["image tokens"]


def test_saved_folder_carries_the_code_under_relative_names(
    repository: Path, saved: dict[str, dict[str, Any]], line: str
) -> None:
    folder = saved[line]["folder"]
    assert sorted(path.name for path in folder.glob("*.py")) == CODE
    for name in CODE:
        assert (folder / name).read_bytes() == (repository / name).read_bytes()
    expected = json.loads((fresh.ROOT / "config.json").read_text())["auto_map"]
    assert json.loads((folder / "config.json").read_text())["auto_map"] == expected
    auto_map = json.loads((folder / "processor_config.json").read_text())["auto_map"]
    assert auto_map == {"AutoProcessor": "processing_bard_vl.BardVLProcessor"}


def test_what_is_saved_on_any_line_loads_without_the_package_on_any_other(
    packages: dict[str, dict[str, Any]], saved: dict[str, dict[str, Any]], line: str, tmp_path: Path
) -> None:
    sources = [one["folder"] for one in (packages[line], *saved.values())]
    folders = [Path(shutil.copytree(source, tmp_path / source.name)) for source in sources]
    packaged, *found = fresh.call("test_remote_code.load_and_save_again", *folders, home=tmp_path / "home", line=line)
    assert sorted(path.name for path in folders[0].glob("*.py")) == CODE
    assert packaged["ids"] == [packages[line]["saved ids"]] * 2
    for by, one in zip(saved.values(), found, strict=True):  # of weights that one step of training has moved
        assert one["ids"] == [by["trained ids"]] * 2 != [by["ids"][0]] * 2
        assert one["image tokens"] == by["image tokens"]
