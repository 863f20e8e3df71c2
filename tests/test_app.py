"""Shared by all fronts: settings by a checkpoint's name, devices, quantised weights and their bytes."""

import ast
import importlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bard_vl import BardVLConfig, BardVLForConditionalGeneration, BardVLGenerationConfig, UsageError, app
from bard_vl.app import devices
from bard_vl.app.checkpoints import complete_settings, read_config
from bard_vl.app.devices import find_device, free_memory
from bard_vl.app.memory import TOLERANCE, certain_bytes, read_prompt, readable, weight_bytes
from bard_vl.app.quantization import bytes_of, check_quantization, saved_bytes
from bard_vl.app.session import Session, build_settings
from bard_vl.generation_config_bard_vl import SETTINGS, Setting, passes
from bard_vl_cli.models import PUBLISHED, WEIGHTS, Published
from fresh import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

CARD = "fudan-generative-ai/Bard-VL-B16-Mask-4B-Distil-Instruct"
EXAMPLE = ROOT / "examples" / "checkpoint"


def complete(
    name: str, config_size: int | None = None, trained: bool | None = None, **stated: Any
) -> tuple[dict, list]:
    config = BardVLConfig(block_size=config_size, trained=trained)
    settings, notices = complete_settings(name, config, BardVLGenerationConfig(**stated))
    return settings.explicit(), notices


# Programs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("started", "is_own"),
    [
        ("python -m > bard_vl.training.merge_blocks recipe.yaml --max_steps 4", True),
        ("python -X importtime > -mbard_vl.evaluation.small_study", True),
        ("python -m > bard_vl_cli run photo.jpg", True),
        ("python > /opt/bin/bard-vl run photo.jpg", True),
        ("python -m > pytest bard_vl.training", False),
        ("python -m > bard_vl_of_others.training", False),
        ("python > /opt/bin/lmms-eval --model bard_vl", False),
        ("> python", False),
    ],
)
def test_only_own_programs_keep_warnings_and_bars_out_of_logs(
    started: str, is_own: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    interpreter, line = (part.split() for part in started.split(">"))
    monkeypatch.setattr(sys, "orig_argv", [*interpreter, *line])
    monkeypatch.setattr(sys, "argv", ["-m", *line[1:]])
    logger = logging.getLogger("torch.utils._pytree")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.delenv("TQDM_DISABLE")
    importlib.reload(app)
    told = logger.makeRecord("", logging.WARNING, "", 0, "%s is an Enum subclass", ("X",), None)
    assert bool(logger.filter(told)) != is_own
    assert ("TQDM_DISABLE" in os.environ) == is_own


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_published_name_states_block_size_and_threshold() -> None:
    settings, notices = complete(CARD)
    assert settings == {"block_size": 16, "confidence_threshold": 0.5}
    assert notices == ["by the checkpoint's name: block size 16, confidence threshold 0.5"]
    assert complete("fudan-generative-ai/Bard-VL-B8-Mask-2B-Distil-Instruct")[0] == {"block_size": 8}
    assert complete("me/Bard-VL-B16-mine")[0] == {"block_size": 16}, "whose threshold nobody has recommended"


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name.rpartition("/")[2])
def test_the_table_of_checkpoints_is_what_their_names_imply(published: Published) -> None:
    implied = {"block_size": published.block_size, "confidence_threshold": published.threshold}
    assert complete(published.name)[0] == {name: value for name, value in implied.items() if value is not None}


def test_what_is_stated_wins_over_the_name(tmp_path: Path) -> None:
    assert complete(CARD, confidence_threshold=0.8) == (
        {"block_size": 16, "confidence_threshold": 0.8},
        ["by the checkpoint's name: block size 16"],
    )
    assert complete(CARD, 4)[0] == {}, "the config knows better"
    folder = tmp_path / CARD.rpartition("/")[2]
    folder.mkdir()
    BardVLGenerationConfig(confidence_threshold=0.7).save_pretrained(folder)
    assert complete(str(folder))[0] == {"block_size": 16}, "0.7 is stored"


@pytest.mark.parametrize(("name", "trained"), [("folder", 4), (CARD, None)])
def test_a_block_size_that_contradicts_warns(name: str, trained: int | None) -> None:
    settings, notices = complete(name, trained, block_size=8)
    assert settings == {"block_size": 8}
    assert notices == [f"block size 8 as asked, but {name} was trained with {trained or 16}"]


def test_a_name_without_a_block_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^folder states no block size: give --block-size, the number after B"):
        complete("folder")


def test_a_seed_is_told_from_a_trained_checkpoint() -> None:
    (notice,) = complete("seed", 4, trained=False)[1]
    assert notice == "seed is a seed: until it is trained for block diffusion it writes nonsense"
    for trained in (True, None):
        assert complete("seed", 4, trained=trained)[1] == []


def test_a_qwen3_vl_folder_is_told_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(UsageError, match=r"model type is qwen3_vl; convert it first: bard-vl convert --source "):
        read_config(str(tmp_path))


# Sizes of Qwen3-VL: hidden, layers, heads, intermediate, tied; of its vision tower: depth, hidden, intermediate.
SHAPES = {
    "2B": ((2048, 28, 16, 6144, True), (24, 1024, 4096)),
    "4B": ((2560, 36, 32, 9728, True), (24, 1024, 4096)),
    "8B": ((4096, 36, 32, 12288, False), (27, 1152, 4304)),
}


@pytest.mark.parametrize("size", SHAPES)
def test_the_table_of_weights_is_that_of_the_shapes(size: str) -> None:
    (hidden, layers, heads, intermediate, tied), (depth, width, middle) = SHAPES[size]
    text = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": 128}
    text |= {"num_key_value_heads": 8, "intermediate_size": intermediate, "tie_word_embeddings": tied}
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": middle, "out_hidden_size": hidden}
    vision |= {"deepstack_visual_indexes": [5, 11, 17]}
    with torch.device("meta"):
        config = BardVLConfig(text_config={"vocab_size": 151936, **text}, vision_config=vision)
        model = BardVLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    whole = weight_bytes(model)
    found = {"bfloat16": whole} | {kind: whole - saved_bytes(model, kind) for kind in ("int8", "nf4")}
    assert WEIGHTS[size] == {kind: pytest.approx(value / 1e9, abs=0.051) for kind, value in found.items()}
    assert {each.size for each in PUBLISHED} == {*SHAPES}


# Devices -------------------------------------------------------------------------------------------------------------


def test_the_default_device_is_the_first_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"mps", "xpu"}
    for module in (torch.cuda, torch.backends.mps, torch.xpu):
        kind = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in there)
    assert devices.available_devices() == ["mps", "xpu", "cpu"]
    there.clear()
    assert find_device() == torch.device("cpu")
    for name in ("cuda", "mps", "xpu:1"):
        with pytest.raises(
            UsageError, match=rf"^--device {name}: this machine has no {name[:4].rstrip(':')}, it has cpu$"
        ):
            find_device(name)
    with pytest.raises(UsageError, match=r"^--device toaster cannot be used: ") as caught:
        find_device("toaster")
    assert len(str(caught.value)) < 300


def test_free_memory_of_an_apple_gpu_is_within_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10_000)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 4_000)
    assert free_memory(torch.device("mps")) == 6_000
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10**15)
    assert free_memory(torch.device("mps")) < 10**14


POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "readline", "pty"}
PROGRAMS = {"evaluation/small_study.py"}  # which locks files


def test_what_only_posix_has_is_imported_by_the_programs_that_need_it() -> None:
    found = set()
    for path in ROOT.glob("**/*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("tests/", ".")):
            continue
        for statement in ast.parse(path.read_text("utf-8")).body:
            names = {alias.name for alias in statement.names} if isinstance(statement, ast.Import) else set()
            names |= {str(statement.module)} if isinstance(statement, ast.ImportFrom) else set()
            found |= {name} if names & POSIX else set()
    assert found <= PROGRAMS


# Quantised weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_answer_and_take_what_was_said(kind: str, tmp_path: Path) -> None:
    pytest.importorskip({"nf4": "bitsandbytes", "int8": "torchao"}[kind])
    plain, session = Session(str(EXAMPLE)), Session(str(EXAMPLE), quantize=kind)
    picture = Image.open(ROOT / "examples" / "images" / "1.png").convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the picture."}]
    messages = [{"role": "user", "content": content}]
    answer = session.ask(messages)
    assert answer.text == plain.ask(messages).text
    tensors = {id(each): each for each in (*session.model.parameters(), *session.model.buffers())}
    assert session.weights == pytest.approx(sum(map(bytes_of, tensors.values())), rel=0.01)
    assert session.weights < plain.weights / 2
    assert session.model.model.visual.blocks[0].mlp.linear_fc1.weight.dtype == torch.float32
    for part in (session.model, session.processor):
        part.save_pretrained(tmp_path)
    stored = Session(str(tmp_path))
    assert stored.is_quantized
    assert stored.weights == pytest.approx(session.weights, rel=0.1)
    assert stored.ask(messages).text == answer.text
    with pytest.raises(UsageError, match="are quantised already"):
        Session(str(tmp_path), quantize=kind)


def save_compressed(folder: Path) -> None:
    """The small checkpoint in 8 bits as compressed-tensors stores them: groups of 64 weights, each with a scale."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    session = Session(str(EXAMPLE))
    bits = quantization.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="group", group_size=64)
    groups = {"all": quantization.QuantizationScheme(targets=["Linear"], weights=bits)}
    kept = ["lm_head", "re:.*visual.*"]
    quantization.apply_quantization_config(
        session.model, quantization.QuantizationConfig(config_groups=groups, ignore=kept, format="pack-quantized")
    )
    for module in session.model.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.detach().unflatten(1, (-1, 64))
            module.weight_scale.data.copy_(calculate_qparams(grouped.amin(-1), grouped.amax(-1), bits)[0])
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(session.model)
    compressor.compress_model(session.model)
    for part in (session.model, session.processor):
        part.save_pretrained(folder)
    compressor.update_config(folder)


def test_weights_of_compressed_tensors_are_unpacked_for_generate_and_score(tmp_path: Path) -> None:
    save_compressed(tmp_path)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Which word is written?"}]}]
    plain, stored, scored = Session(str(EXAMPLE)), Session(str(tmp_path)), Session(str(tmp_path))
    answer = plain.ask(messages)
    assert stored.ask(messages).text == answer.text
    tensors = {id(each): each for each in (*stored.model.parameters(), *stored.model.buffers())}
    assert stored.weights == pytest.approx(sum(map(bytes_of, tensors.values())), rel=0.02)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < stored.weights / 2
    inputs = plain.encode(messages)
    response = answer.output.sequences[:, inputs["input_ids"].shape[1] :]
    scores = [session.model.score(inputs, response).sum().item() for session in (plain, scored)]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)


def test_a_checkpoint_that_lacks_weights_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLE, tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    lost = sorted(name for name in tensors if name.startswith("model.visual.merger."))
    save_file(
        {name: tensors[name] for name in tensors if name not in lost}, folder / "model.safetensors", {"format": "pt"}
    )
    session = Session(str(folder))
    with pytest.raises(
        OSError, match=f"folder lacks weights that its config asks for: {lost[0]} and {len(lost) - 1} other"
    ):
        _ = session.model


def test_weights_spread_by_accelerate_answer_alike() -> None:
    spread = Session(str(EXAMPLE), device_map="auto")
    messages = [{"role": "user", "content": [{"type": "text", "text": "Which word is written?"}]}]
    assert spread.ask(messages).text == Session(str(EXAMPLE)).ask(messages).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "--quantize must be int8 or nf4, got int3"),
        ({"device_map": "everywhere"}, "--device-map must be one of auto, balanced"),
    ],
)
def test_unknown_ways_to_load_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Session(str(EXAMPLE), **options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r'^--quantize nf4 needs bitsandbytes, accelerate: pip install "bard-vl\[quant'
    ):
        check_quantization("nf4")


def test_too_little_memory_is_advised_on_lighter_weights() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Which word is written?"}]}]
    session = Session(str(EXAMPLE))
    inputs = session.encode(messages)
    least = certain_bytes(session.shape, *read_prompt(session.shape, inputs, session.settings))
    ways = [words.rpartition("--")[2] for words, _ in session.lighter]
    assert ways == ["dtype bfloat16", "quantize int8", "quantize nf4"]
    for words, weights in session.lighter:
        session.memory = int((weights + least) * TOLERANCE) + 1
        with pytest.raises(ValueError, match=f"{readable(session.memory)} free.*; or {words}"):
            session.check_memory(inputs)


SOME_VALUES = (2, 0.25, "x", [5], [[5, 6]], [[[5], 0.5]])


@pytest.mark.xdist_group("programs")  # one worker imports their libraries
@pytest.mark.parametrize("row", SETTINGS.values(), ids=SETTINGS)
def test_a_row_of_the_table_reaches_every_program(row: Setting) -> None:
    """A value that the row's check takes arrives from the command line, the server's start, the page and lmms-eval."""
    from bard_vl.serving.__main__ import parse_arguments
    from bard_vl.viewer.demo import CONTROLS, read_controls

    value = next(value for value in (*row.allowed.get("choices", ()), *SOME_VALUES) if passes(row, value))
    text, given = f"{row.name}={json.dumps(value)}", ["low_confidence_static", 0.5, 1, 8, 0.0]
    assert len(CONTROLS) == len(given)
    if row.owner == "program":
        with pytest.raises(UsageError, match=f"`{row.name}`"):
            build_settings({}, [text])
    else:
        assert build_settings({}, [text]).explicit() == {row.name: value}
        assert parse_arguments(["model", "--set", text])[1].explicit() == {row.name: value}
    if row.owner == "user":
        assert read_controls((*given, f"\n {text}\n"))[row.name] == value
    else:
        with pytest.raises(UsageError, match=f"`{row.name}` is the server's"):
            read_controls((*given, text))
    assert BardVLGenerationConfig(**{row.name: value}).explicit() == {row.name: value}  # what lmms-eval's model asks
