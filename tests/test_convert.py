"""The converter on sound sources: bytes, settings and files of the output, and what is said about them."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import convert_cases as cases
import pytest
import tiny
import torch
from bard_vl import convert_qwen3vl_to_bard as converter
from bard_vl.convert_qwen3vl_to_bard import ConversionError
from safetensors import safe_open

MASK = cases.MASK
EMBEDDING = "model.language_model.embed_tokens.weight"
BARD_NAME = "Bard-VL-B16-Mask-4B-Instruct"


def write_bard_source(path: Path) -> Path:
    """A Bard-VL checkpoint as published: no code, no block size, no mask id, sub-configs under names of their own."""
    source = cases.write_source(path, bfloat16=True)
    cases.edit_json(source / "config.json", {"model_type": "bard_vl"})
    cases.edit_json(source / "config.json", {"model_type": "bard_vl_text"}, "text_config")
    cases.edit_json(source / "config.json", {"model_type": "bard_vl"}, "vision_config")
    return source


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("source_shards", [None, "300KB"], ids=["single file", "shards"])
@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
def test_no_tensor_byte_changes(tied: bool, source_shards: str | None, bfloat16: bool, tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source", tied, source_shards, bfloat16=bfloat16)
    before = cases.file_digests(source)
    output = cases.convert(source, tmp_path / "out")
    assert cases.tensor_bytes(output) == cases.tensor_bytes(source)
    assert ("lm_head.weight" in cases.tensor_bytes(output)) is not tied
    assert cases.file_digests(source) == before


def test_no_tensor_byte_changes_when_chunks_cut_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cases.write_source(tmp_path / "source")
    for chunk_size in (1000, 4097):
        monkeypatch.setattr(converter, "CHUNK_SIZE", chunk_size)
        output = cases.convert(source, tmp_path / f"out{chunk_size}")
        assert cases.tensor_bytes(output) == cases.tensor_bytes(source)


@pytest.mark.parametrize("damage", [None, "metadata", "head"])
def test_shards_are_copied_unless_one_must_change(damage: str | None, tmp_path: Path) -> None:
    """A file whose metadata names another framework does not load; a tied head is left out."""
    source = cases.write_source(tmp_path / "source", shard_size="300KB")
    index = cases.read_json(source / "model.safetensors.index.json")["weight_map"]
    first = source / index[EMBEDDING]
    header, data = cases.read_shard(first)
    if damage == "metadata":
        header["__metadata__"] = {"format": "tf"}
    if damage == "head":
        start, end = header[EMBEDDING]["data_offsets"]
        header["lm_head.weight"] = {**header[EMBEDDING], "data_offsets": [len(data), len(data) + end - start]}
        data += data[start:end]
        cases.edit_json(source / "model.safetensors.index.json", {"lm_head.weight": first.name}, "weight_map")
    if damage:
        cases.write_shard(first, header, data)
    output = cases.convert(source, tmp_path / "out")
    before, after = cases.file_digests(source), cases.file_digests(output)
    changed = {name for name in before if name.endswith(".safetensors") and before[name] != after[name]}
    assert changed == ({first.name} if damage else set())
    with safe_open(output / first.name, "pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    expected = cases.tensor_bytes(source)
    expected.pop("lm_head.weight", None)
    assert cases.tensor_bytes(output) == expected


def test_shards_are_numbered_and_the_index_covers_them(tmp_path: Path) -> None:
    """Files of the source may have any names."""
    source = cases.write_source(tmp_path / "source", tied=False, shard_size="300KB")
    stored, index = sorted(source.glob("*.safetensors")), source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-", "part-"))
    for path in stored:
        path.rename(path.with_name(path.name.replace("model-", "part-")))
    output = cases.convert(source, tmp_path / "out")
    shards = sorted(output.glob("*.safetensors"))
    assert [path.name for path in shards] == [path.name for path in stored]  # as transformers numbers them
    assert len(shards) > 3
    index = cases.read_json(output / "model.safetensors.index.json")
    places: dict[str, str] = {}
    for path in shards:
        with safe_open(path, "pt") as shard:
            places |= dict.fromkeys(shard.keys(), path.name)
            assert shard.metadata() == {"format": "pt"}
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in cases.tensor_bytes(output).values())


def test_single_file_has_the_layout_of_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = cases.write_source(tmp_path / "source", bfloat16=True)
    output = cases.convert(source, tmp_path / "out")
    save_file(load_file(output / "model.safetensors"), tmp_path / "library.safetensors", {"format": "pt"})
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    assert not (output / "model.safetensors.index.json").exists()


def test_memory_stays_far_under_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cases.write_source(tmp_path / "source", intermediate_size=16_384)
    largest = max(len(data) for _, _, data in cases.tensor_bytes(source).values())
    assert largest >= 4 * 2**20
    monkeypatch.setattr(converter, "CHUNK_SIZE", 2**18)
    tracemalloc.start()
    cases.convert(source, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < largest / 2


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
def test_mask_row_mean_changes_that_row_alone(
    tied: bool, bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "CHUNK_SIZE", 1000)  # rows of 128 or 256 bytes: edits meet chunk borders
    source = cases.write_source(tmp_path / "source", tied, bfloat16=bfloat16)
    output = cases.convert(source, tmp_path / "out", mask_row="mean")
    before, after = cases.tensor_bytes(source), cases.tensor_bytes(output)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == ({EMBEDDING} if tied else {EMBEDDING, "lm_head.weight"})
    num_tokens = len(cases.read_json(source / "vocab.json")) + len(tiny.ADDED_TOKENS)
    assert num_tokens < MASK
    for name in changed:
        with safe_open(source / "model.safetensors", "pt") as old, safe_open(output / "model.safetensors", "pt") as new:
            expected, actual = old.get_tensor(name), new.get_tensor(name)
        expected[MASK] = expected[:num_tokens].double().mean(0).to(expected.dtype)
        assert torch.equal(actual, expected)
    assert f"except the rows of the mask token in {EMBEDDING}" in (output / "README.md").read_text()


def test_mean_leaves_the_mask_token_itself_out(tmp_path: Path) -> None:
    """The tokenizer may have a mask token of its own: its row is no part of the mean."""
    source = cases.write_source(tmp_path / "source")
    last = len(cases.read_json(source / "vocab.json")) + len(tiny.ADDED_TOKENS) - 1
    with pytest.raises(ConversionError, match=r"is a token added to the tokenizer \('</think>'\)"):
        cases.convert(source, tmp_path / "out", mask_row="mean", mask_token_id=last)
    cases.edit_json(source / "tokenizer_config.json", {"mask_token": tiny.ADDED_TOKENS[-1]})
    output = cases.convert(source, tmp_path / "out", mask_row="mean", mask_token_id=last)
    with safe_open(source / "model.safetensors", "pt") as old, safe_open(output / "model.safetensors", "pt") as new:
        expected, actual = old.get_tensor(EMBEDDING), new.get_tensor(EMBEDDING)
    assert torch.equal(actual[last], expected[:last].double().mean(0).float())


def test_mean_from_a_tokenizer_in_the_older_files(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    expected = cases.convert(source, tmp_path / "expected", mask_row="mean")
    content = cases.read_json(source / "tokenizer.json")
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    (source / "added_tokens.json").write_text(json.dumps(added))
    (source / "tokenizer.json").unlink()
    output = cases.convert(source, tmp_path / "out", mask_row="mean")
    assert cases.tensor_bytes(output) == cases.tensor_bytes(expected)


def test_head_that_repeats_tied_embeddings_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = cases.write_source(tmp_path / "source")
    header, data = cases.read_shard(source / "model.safetensors")
    start, end = header[EMBEDDING]["data_offsets"]
    header["lm_head.weight"] = {**header[EMBEDDING], "data_offsets": [len(data), len(data) + end - start]}
    cases.write_shard(source / "model.safetensors", header, data + data[start:end])
    output = cases.convert(source, tmp_path / "out", progress=True)
    assert cases.tensor_bytes(source).keys() - cases.tensor_bytes(output).keys() == {"lm_head.weight"}
    assert "lm_head.weight repeats the tied embeddings" in capsys.readouterr().out


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_config_gains_what_the_loader_needs_and_keeps_the_rest(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    cases.edit_json(source / "config.json", {"my_own_key": [1, 2]})
    before, after = (
        cases.read_json(folder / "config.json") for folder in (source, cases.convert(source, tmp_path / "out"))
    )
    model = "modeling_bard_vl.BardVLForConditionalGeneration"
    added = {
        "model_type": "bard_vl",
        "architectures": ["BardVLForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_bard_vl.BardVLConfig",
            "AutoModel": model,
            "AutoModelForImageTextToText": model,
            "AutoModelForCausalLM": model,
            "AutoModelForMultimodalLM": model,
        },
        "block_size": 4,
        "mask_token_id": MASK,
        "trained": False,
    }
    assert after == {**before, **added}


@pytest.mark.parametrize("level", [None, "text_config"])
@pytest.mark.parametrize("tied", [True, False])
def test_tie_flag_on_one_level_is_written_on_both(level: str | None, tied: bool, tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source", tied=tied)
    cases.edit_json(source / "config.json", {"tie_word_embeddings": None}, level)
    config = cases.read_json(cases.convert(source, tmp_path / "out") / "config.json")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is tied


def test_rope_parameters_of_transformers_5_become_the_older_spelling(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    modern = {"rope_scaling": None, "rope_theta": None, "rope_parameters": {**rope, "rope_theta": 12345}}
    cases.edit_json(source / "config.json", {**modern, "rope_scaling": {}}, "text_config")
    cases.edit_json(source / "config.json", {"rope_scaling": None}, "text_config")
    cases.edit_json(source / "config.json", {"model_type": "qwen3_vl_vision"}, "vision_config")
    config = cases.read_json(cases.convert(source, tmp_path / "out") / "config.json")
    assert "rope_parameters" not in config["text_config"]
    assert config["text_config"]["rope_theta"] == 12345
    assert config["text_config"]["rope_scaling"] == rope
    assert config["vision_config"]["model_type"] == "qwen3_vl"


def test_absent_rope_theta_is_written_out(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    cases.edit_json(source / "config.json", {"rope_theta": None}, "text_config")
    config = cases.read_json(cases.convert(source, tmp_path / "out") / "config.json")
    assert config["text_config"]["rope_theta"] == 5_000_000


def test_generation_settings_are_greedy_and_keep_the_token_ids(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    ids = tiny.IDS["small"]
    expected = {
        "bos_token_id": ids.pad_token_id,
        "eos_token_id": [ids.eos_token_id, ids.pad_token_id],
        "pad_token_id": ids.pad_token_id,
        "remasking_strategy": "low_confidence_dynamic",
        "confidence_threshold": 0.9,
        "max_new_tokens": 256,
    }
    assert cases.read_json(cases.convert(source, tmp_path / "out") / "generation_config.json") == expected
    (source / "generation_config.json").unlink()
    settings = cases.read_json(cases.convert(source, tmp_path / "out2") / "generation_config.json")
    assert (settings["eos_token_id"], settings["bos_token_id"]) == (ids.eos_token_id, ids.pad_token_id)


@pytest.mark.parametrize(
    ("name", "stated", "asked", "expected"),
    [
        (BARD_NAME, None, None, 16),
        ("Bard-VL-B4-Mask-8B-Instruct", None, None, 4),
        (BARD_NAME, 32, None, 32),
        (BARD_NAME, None, 8, 8),
        ("mine", None, 8, 8),
    ],
)
def test_published_bard_vl_gets_code_block_size_and_settings(
    name: str, stated: int | None, asked: int | None, expected: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write_bard_source(tmp_path / name)
    if stated:
        cases.edit_json(source / "config.json", {"block_size": stated})
    output = cases.convert(source, tmp_path / "out", block_size=asked, progress=True)
    config = cases.read_json(output / "config.json")
    assert (config["block_size"], config["mask_token_id"]) == (expected, MASK)
    assert (config["text_config"]["model_type"], config["vision_config"]["model_type"]) == ("qwen3_vl_text", "qwen3_vl")
    assert cases.tensor_bytes(output) == cases.tensor_bytes(source)
    assert (output / "modeling_bard_vl.py").is_file()
    assert ("although the source was trained with 16" in capsys.readouterr().out) is (name == BARD_NAME and asked == 8)
    card = (output / "README.md").read_text()
    assert "The source is a Bard-VL checkpoint" in card
    assert "starting point" not in card
    assert ("base_model: fudan-generative-ai/" in card) is (name != "mine")


@pytest.mark.parametrize(
    ("name", "block_size", "stated", "expected"),
    [
        ("Bard-VL-B16-Mask-4B-Distil-Instruct", None, None, 0.5),
        (BARD_NAME, None, None, 0.5),
        (BARD_NAME, 8, None, 0.9),
        ("Bard-VL-B32-Mask-4B-Instruct", None, None, 0.9),
        ("Bard-VL-B16-of-mine", None, None, 0.9),
        ("Bard-VL-B16-of-mine", None, 0.7, 0.7),
        (BARD_NAME, None, 0, 0),
    ],
)
def test_bard_vl_sources_keep_their_threshold(
    name: str,
    block_size: int | None,
    stated: float | None,
    expected: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    source = write_bard_source(tmp_path / name)
    cases.edit_json(source / "generation_config.json", {"confidence_threshold": stated})
    output = cases.convert(source, tmp_path / "out", block_size=block_size, progress=True)
    assert cases.read_json(output / "generation_config.json")["confidence_threshold"] == expected
    assert f"`confidence_threshold` of {expected}" in (output / "README.md").read_text()
    note = f"the confidence threshold is 0.5, as the authors of fudan-generative-ai/{name} recommend at block size 16"
    assert (note in capsys.readouterr().out) is (expected == 0.5)
    again = cases.convert(output, tmp_path / "again")
    assert cases.read_json(again / "generation_config.json")["confidence_threshold"] == expected


@pytest.mark.parametrize("threshold", ["x", True, 1.5, -1, [0.5]])
def test_odd_threshold_of_a_source_is_named(threshold: Any, tmp_path: Path) -> None:
    source = write_bard_source(tmp_path / BARD_NAME)
    cases.edit_json(source / "generation_config.json", {"confidence_threshold": threshold})
    with pytest.raises(ConversionError, match=r"generation_config.json: confidence_threshold is .* instead of"):
        cases.convert(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Qwen3-VL", "seed", "trained", "published"])
def test_seeds_are_marked_and_said_to_be_untrained(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = cases.write_source(tmp_path / "source") if kind == "Qwen3-VL" else write_bard_source(tmp_path / BARD_NAME)
    if kind in ("seed", "trained"):
        cases.edit_json(source / "config.json", {"trained": kind == "trained"})
    output = cases.convert(source, tmp_path / "out", progress=True)
    is_seed = kind in ("Qwen3-VL", "seed")
    assert cases.read_json(output / "config.json").get("trained") is {"trained": True, "published": None}.get(
        kind, False
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("a seed: until it is trained for block diffusion" in last) is is_seed
    assert ("These weights are a starting point" in (output / "README.md").read_text()) is is_seed


@pytest.mark.parametrize("level", [None, "text_config", "vision_config"])
def test_settings_that_equal_their_defaults_need_not_be_stated(level: str | None, tmp_path: Path) -> None:
    """transformers leaves them out when it saves a config."""
    source = cases.write_source(tmp_path / "source")
    names = {None: ("block_size", "mask_token_id"), "text_config": ("attention_bias", "rms_norm_eps", "hidden_act")}
    changes = dict.fromkeys(names.get(level, ("in_channels", "patch_size", "temporal_patch_size")), 0)
    cases.edit_json(source / "config.json", changes, level)
    cases.edit_json(source / "config.json", dict.fromkeys(changes), level)
    assert cases.tensor_bytes(cases.convert(source, tmp_path / "out")) == cases.tensor_bytes(source)


def test_stated_nothing_is_as_good_as_unstated(tmp_path: Path) -> None:
    source = write_bard_source(tmp_path / BARD_NAME)
    content = cases.read_json(source / "config.json")
    content |= {"block_size": None, "mask_token_id": None, "quantization_config": None, "tie_word_embeddings": None}
    (source / "config.json").write_text(json.dumps(content))
    config = cases.read_json(cases.convert(source, tmp_path / "out") / "config.json")
    assert (config["block_size"], config["tie_word_embeddings"]) == (16, True)
    assert "quantization_config" not in config  # transformers 4.57 cannot read one of null


def test_text_that_utf8_cannot_spell_is_kept(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    cases.edit_json(source / "config.json", {"half": "\ud83d", "whole": "é😀"})
    config = cases.read_json(cases.convert(source, tmp_path / "out") / "config.json")
    assert (config["half"], config["whole"]) == ("\ud83d", "é😀")


def test_converting_a_converted_folder_changes_nothing_but_the_card(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    first = cases.convert(source, tmp_path / "first", block_size=8)
    second = cases.convert(first, tmp_path / "second", mask_token_id=None)
    before, after = cases.file_digests(first), cases.file_digests(second)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {"README.md"}


# --- Files beside the weights -----------------------------------------------------------------------------------------


def test_tokenizer_and_processor_files_are_copied_unchanged(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    for name in ("special_tokens_map.json", "added_tokens.json", "LICENSE", ".gitattributes"):
        (source / name).write_bytes(b"{}\r\n")
    (source / "optimizer.pt").touch()
    before = cases.file_digests(source)
    output = cases.convert(source, tmp_path / "out")
    after = cases.file_digests(output)
    ours = {"config.json", "generation_config.json", "model.safetensors", "optimizer.pt"}
    assert {name: after[name] for name in before.keys() - ours} == {name: before[name] for name in before.keys() - ours}
    assert "optimizer.pt" not in after
    code = {path.name for path in cases.ROOT.glob("*_bard_vl.py")}
    assert {"configuration_bard_vl.py", "modeling_bard_vl.py", "processing_bard_vl.py"} <= code
    assert all((output / name).read_bytes() == (cases.ROOT / name).read_bytes() for name in code)
    written = {"README.md", "processor_config.json", "LICENSE-CODE", ".gitignore"}
    assert after.keys() - before.keys() - code <= written


@pytest.mark.parametrize("where", ["jinja", "processor", "tokenizer", "both", "nowhere"])
def test_both_processor_and_tokenizer_find_the_chat_template(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoTokenizer

    source = cases.write_source(tmp_path / "source")
    if where not in ("processor", "both"):
        (source / "chat_template.json").unlink()
    if where not in ("tokenizer", "both"):
        cases.edit_json(source / "tokenizer_config.json", {"chat_template": None})
    if where == "jinja":
        (source / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    output = cases.convert(source, tmp_path / "out", progress=True)
    assert ("no chat template" in capsys.readouterr().out) is (where == "nowhere")
    assert (output / "chat_template.jinja").is_file() is (where in ("jinja", "processor", "tokenizer"))
    # The plain class reads the files without asking for config.json's code.
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=False, tokenizer_type="qwen2")
    assert tokenizer.chat_template == (None if where == "nowhere" else tiny.CHAT_TEMPLATE)


def test_nested_processor_config_of_transformers_5_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = cases.write_source(tmp_path / "source")
    image = cases.read_json(source / "preprocessor_config.json")
    (source / "preprocessor_config.json").unlink()
    nested = {"image_processor": image, "processor_class": "Qwen3VLProcessor"}
    (source / "processor_config.json").write_text(json.dumps(nested))
    output = cases.convert(source, tmp_path / "out", progress=True)
    assert cases.read_json(output / "processor_config.json") == {
        "image_processor": image,
        "processor_class": "BardVLProcessor",
        "auto_map": {"AutoProcessor": "processing_bard_vl.BardVLProcessor"},
        "mask_token_id": cases.read_json(output / "config.json")["mask_token_id"],
    }
    assert "saved by transformers 5" in capsys.readouterr().out


@pytest.mark.parametrize("sign", ["name", "template", "neither"])
def test_thinking_sources_are_said_to_be_such(sign: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = cases.write_source(tmp_path / ("Qwen3-VL-4B-Thinking" if sign == "name" else "source"))
    if sign == "template":
        template = tiny.CHAT_TEMPLATE.replace("assistant\\n", "assistant\\n<think>\\n")
        (source / "chat_template.jinja").write_text(template)
    cases.convert(source, tmp_path / "out", progress=True)
    assert ("a Thinking source" in capsys.readouterr().out) is (sign != "neither")


# --- The card ---------------------------------------------------------------------------------------------------------


def test_card_of_a_release_names_base_model_licence_and_state(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "Qwen3-VL-4B-Instruct")
    front = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [a]\n---\n\nlicense: no\n"
    (source / "README.md").write_text(front)
    card = (cases.convert(source, tmp_path / "out", block_size=8) / "README.md").read_text()
    metadata = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert metadata == {
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "Qwen/Qwen3-VL-4B-Instruct",
        "base_model_relation": "finetune",
        "language": "[en, zh]",
        "tags": "[custom_code, block-diffusion, diffusion-language-model, vision-language]",
    }
    assert "These weights are a starting point, not a finished model." in card
    assert "(block size 8)" in card
    assert "every tensor is byte for byte the source's." in card


def test_card_without_known_base_or_licence_guesses_no_base(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = cases.write_source(tmp_path / "Qwen3-VL-4B-mine")
    card = (cases.convert(source, tmp_path / "out", progress=True) / "README.md").read_text()
    assert "base_model" not in card
    assert "license: apache-2.0" in card
    assert "states no licence" in capsys.readouterr().out


@pytest.mark.process
def test_quick_start_of_the_card_runs(tmp_path: Path) -> None:
    """The card's code, with a local picture for the remote one."""
    source = cases.write_source(tmp_path / "source")
    output = cases.convert(source, tmp_path / "Bard-VL-tiny")
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    picture = tiny.draw_scene(tmp_path / "picture.png")
    address = next(part for part in code.split('"') if part.startswith("https://"))
    (tmp_path / "quick_start.py").write_text(code.replace(address, str(picture)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    line = [sys.executable, "quick_start.py"]
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr


# --- Script and Hub ---------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_script_reports_and_shows_no_bar_in_logs(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    result = cases.run_script(source, tmp_path / "new" / "out", "--block-size", "8", "--mask-row", "mean")
    assert result.returncode == 0, result.stderr
    assert "92 tensors" in result.stdout
    assert "all verified by SHA-256" in result.stdout
    assert f"block size 8, mask token {MASK}, changed rows: row {MASK} of {EMBEDDING}" in result.stdout
    assert result.stderr == ""
    assert cases.read_json(tmp_path / "new" / "out" / "config.json")["block_size"] == 8


def test_a_terminal_shows_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, terminal = cases.write_source(tmp_path / "source"), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    cases.convert(source, tmp_path / "out", progress=True)
    assert "verifying: 100%" in terminal.getvalue()


def test_the_script_can_be_quiet(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    source = cases.write_source(tmp_path / "source")
    capfd.readouterr()  # of writing it
    assert converter.main(cases.command(source, tmp_path / "quiet", "--quiet")[2:]) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.process
def test_script_exits_with_1_on_errors_and_2_on_usage(tmp_path: Path) -> None:
    failed = cases.run_script(tmp_path / "absent", tmp_path / "out")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: source ")
    assert cases.run_script(tmp_path, tmp_path / "out", "--mask-row", "zero").returncode == 2


@pytest.mark.process
def test_script_checks_what_is_quick_before_it_imports_torch(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    os.truncate(source / "model.safetensors", 1000)
    code = (
        "import runpy, sys; sys.modules.update(torch=None, transformers=None); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for options, message in ((["--help"], ""), ([], "model.safetensors is truncated")):
        line = [sys.executable, "-c", code, *cases.command(source, tmp_path / "out", *options)[1:]]
        result = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert result.returncode == bool(message)
        assert message in result.stderr
        assert "Traceback" not in result.stderr


WINDOWS = """
import os, runpy, sys
sys.modules["fcntl"] = None
del os.O_DIRECTORY, os.posix_fadvise
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.process
def test_conversion_needs_nothing_that_posix_alone_has(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("of a killed run")
    line = [sys.executable, "-c", WINDOWS, *cases.command(source, tmp_path / "out", "--quiet")[1:]]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert cases.tensor_bytes(tmp_path / "out") == cases.tensor_bytes(source)


def write_hub_cache(path: Path, repo: str, commit: str, **source: Any) -> Path:
    """A Hub cache with one downloaded repository."""
    folder = path / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots").mkdir()
    cases.write_source(folder / "snapshots" / commit, **source)
    return path


def test_hub_id_as_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = "Qwen/Qwen3-VL-2B-Instruct"
    hub = write_hub_cache(tmp_path / "hub", repo, commit, shard_size="300KB")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in ([], ["--revision", commit]):
        output = tmp_path / f"out{len(revision)}"
        assert converter.main(cases.command(repo, output, *revision)[2:]) == 0
        assert f"converted {repo} to" in capsys.readouterr().out
        card = (output / "README.md").read_text()
        assert f"base_model: {repo}\n" in card
        assert f"Converted from {repo} at commit `{commit}`" in card
        snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-VL-2B-Instruct" / "snapshots" / commit
        assert cases.tensor_bytes(output) == cases.tensor_bytes(snapshot)
    assert converter.main(cases.command(repo, tmp_path / "out", "--revision", "v2")[2:]) == 1
    assert f"error: cannot fetch {repo} (revision v2) from the Hub" in capsys.readouterr().err


def test_hub_source_is_refused_before_its_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cases.write_source(tmp_path / "snapshot")
    cases.edit_json(snapshot / "config.json", {"model_type": "qwen3_vl_moe"})
    patterns: list[str] = []

    def fetch(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(converter, "snapshot_download", fetch)
    with pytest.raises(ConversionError, match="qwen3_vl_moe"):
        cases.convert("Qwen/Qwen3-VL-30B-A3B-Instruct", tmp_path / "out")
    assert "config.json" in patterns
    assert not any("safetensors" in pattern for pattern in patterns)


class Uploads:
    """Stands for the Hub's client, and records its calls."""

    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    error: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        Uploads.calls += (("create", {"repo_id": repo_id, **options}),)

    def upload_folder(self, **options: Any) -> None:
        if Uploads.error:
            raise Uploads.error
        names = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        Uploads.calls += (("upload", {**options, "names": names}),)


def test_push_to_hub_uploads_the_finished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cases.write_source(tmp_path / "source")
    monkeypatch.setattr(converter, "HfApi", Uploads)
    monkeypatch.setattr(Uploads, "calls", ())
    output = cases.convert(source, tmp_path / "out", push_to_hub="me/Bard-VL-tiny", private=True)
    (create, creation), (upload, options) = Uploads.calls
    assert (create, creation) == ("create", {"repo_id": "me/Bard-VL-tiny", "private": True, "exist_ok": True})
    assert (upload, options["repo_id"], options["folder_path"]) == ("upload", "me/Bard-VL-tiny", output)
    assert options["names"] == sorted(path.name for path in output.iterdir())
    card = (output / "README.md").read_text()
    assert "# Bard-VL-tiny\n" in card
    assert 'path = "me/Bard-VL-tiny"' in card


def test_failed_upload_keeps_the_folder_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cases.write_source(tmp_path / "source")
    monkeypatch.setattr(converter, "HfApi", Uploads)
    monkeypatch.setattr(Uploads, "error", RuntimeError("401 Unauthorized"))
    with pytest.raises(ConversionError, match=r"out is complete, but its upload to me/x failed: 401"):
        cases.convert(source, tmp_path / "out", push_to_hub="me/x")
    assert cases.tensor_bytes(tmp_path / "out") == cases.tensor_bytes(source)
