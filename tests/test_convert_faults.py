"""Faults of the converter: a bad source, target or moment gives a clear error and leaves nothing behind."""

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convert_cases as cases
import pytest
import thorough
from bard_vl import convert_qwen3vl_to_bard as converter
from bard_vl.convert_qwen3vl_to_bard import ConversionError

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.language_model.embed_tokens.weight"
NORM = "model.language_model.norm.weight"


def shard(source: Path, number: int = 0) -> Path:
    return sorted(source.glob("*.safetensors"))[number]


def cut(source: Path, size: int) -> None:
    """Shorten the last shard to `size` bytes, or by as many if negative."""
    path = shard(source, -1)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def edit_header(source: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    header, data = cases.read_shard(shard(source))
    edit(header)
    cases.write_shard(shard(source), header, data)


def first_entry(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for entry in header.values() if entry.get("data_offsets", [1])[0] == 0)


def set_dtype(source: Path, dtype: str) -> None:
    edit_header(source, lambda header: first_entry(header).update(dtype=dtype))


def set_entry(source: Path, **changes: Any) -> None:
    """Change the header's first entry; NESTED and DIGITS stand for what json.dumps cannot write."""
    header, data = cases.read_shard(shard(source))
    first_entry(header).update(changes)
    text = json.dumps(header).encode().replace(b'"NESTED"', b"[" * 1000 + b"]" * 1000)
    cases.write_shard(shard(source), text.replace(b'"DIGITS"', b"1" * 5000), data)


def quantise(source: Path) -> None:
    """The first tensor has four 8-bit numbers for each of its 32-bit ones."""
    _, size = first_entry(cases.read_shard(shard(source))[0])["data_offsets"]
    set_entry(source, dtype="F8_E4M3", shape=[size])


def double_name(source: Path) -> None:
    header, data = cases.read_shard(shard(source))
    entry = json.dumps(first_entry(header)).encode()
    cases.write_shard(shard(source), b'{"twin": ' + entry + b', "twin": ' + entry + b"}", data)


def overlap(source: Path) -> None:
    def shift(header: dict[str, Any]) -> None:
        entry = max((entry for entry in header.values() if "data_offsets" in entry), key=lambda e: e["data_offsets"])
        entry["data_offsets"] = [offset - 4 for offset in entry["data_offsets"]]

    edit_header(source, shift)


def rename_tensor(source: Path, old: str, new: str) -> None:
    edit_header(source, lambda header: header.update({new: header.pop(old)}))


def edit_weight_map(source: Path, changes: dict[str, str | None]) -> None:
    cases.edit_json(source / INDEX, changes, "weight_map")


def copy_tensor_to_other_shard(source: Path) -> None:
    """Shard 1 gets one of shard 2's tensors once more; the index is unchanged."""
    header, data = cases.read_shard(shard(source, 1))
    name = next(name for name in header if name != "__metadata__")
    start, end = header[name]["data_offsets"]
    first_header, first_data = cases.read_shard(shard(source))
    first_header[name] = {**header[name], "data_offsets": [len(first_data), len(first_data) + end - start]}
    cases.write_shard(shard(source), first_header, first_data + data[start:end])


def add_head(source: Path) -> None:
    """A tied checkpoint gets an output matrix of its own."""
    header, data = cases.read_shard(shard(source))
    start, end = header[EMBEDDING]["data_offsets"]
    header["lm_head.weight"] = {**header[EMBEDDING], "data_offsets": [len(data), len(data) + end - start]}
    cases.write_shard(shard(source), header, data + bytes(end - start))


def set_config(source: Path, changes: dict[str, Any], level: str | None = None) -> None:
    cases.edit_json(source / "config.json", changes, level)
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"DIGITS"', "1" * 5000))


def set_generation(source: Path, changes: dict[str, Any]) -> None:
    cases.edit_json(source / "generation_config.json", changes)


def rename(source: Path, old: str, new: str) -> None:
    (source / old).rename(source / new)


SINGLE_FILE_FAULTS = {
    "truncated data": (lambda s: cut(s, -10), "truncated"),
    "truncated header": (lambda s: cut(s, 100), "truncated"),
    "empty shard": (lambda s: cut(s, 0), "truncated or no safetensors file: 0 bytes"),
    "longer than its header": (lambda s: os.truncate(shard(s), 10**6), "1000000 bytes, incomplete metadata, file not"),
    "absurd header length": (lambda s: shard(s).write_bytes(b"\xff" * 64), "no safetensors file"),
    "header is no JSON": (lambda s: cases.write_shard(shard(s), b"{nonsense", b""), "file: 17 bytes, invalid JSON"),
    "header is a list": (lambda s: cases.write_shard(shard(s), b"[]", b""), "invalid type: sequence, expected struct"),
    "entry without dtype": (lambda s: edit_header(s, lambda h: first_entry(h).pop("dtype")), "missing field `dtype`"),
    "unknown dtype": (lambda s: set_dtype(s, "I32"), "unknown dtype 'I32'"),
    "dtype of other width": (lambda s: set_dtype(s, "F64"), "invalid shape, data type, or offset for tensor"),
    "FP8": (quantise, "quantised source .*F8_E4M3.*convert the bfloat16 release"),
    "FP8 scales": (lambda s: rename_tensor(s, NORM, "x.weight_scale_inv"), "quantised source"),
    "overlapping tensors": (overlap, "invalid offset for tensor `model.visual.pos_embed.weight`"),
    "duplicate tensor in one file": (double_name, "file not fully covered"),
    "missing and unexpected tensor": (lambda s: rename_tensor(s, NORM, "norm"), f"lacks 1 of its tensors: {NORM}"),
    "unexpected tensor": (add_head, "lm_head.weight differs from the embedding"),
    "untied without head": (lambda s: set_config(s, {"tie_word_embeddings": False}, "text_config"), "lm_head.weight"),
    "one layer too many": (lambda s: set_config(s, {"num_hidden_layers": 2}, "text_config"), "should not have 11"),
    "one layer too few": (lambda s: set_config(s, {"num_hidden_layers": 4}, "text_config"), "lacks 11 .*layers.3"),
    "deeper vision tower": (lambda s: set_config(s, {"depth": 4}, "vision_config"), "lacks 12 .*visual.blocks.3"),
    "other vocabulary": (lambda s: set_config(s, {"vocab_size": 500}, "text_config"), r"asks for \[500, 64\]"),
    "config of another model": (
        lambda s: set_config(s, {"hidden_size": None}, "text_config"),  # 4096, if it is not stated
        r"embed_tokens.weight has shape \[448, 64\], config.json asks for \[448, 4096\]",
    ),
    "header nested deep": (lambda s: cases.write_shard(shard(s), b"[" * 10**5 + b"]" * 10**5, b""), "invalid JSON"),
    "entry nested deep": (lambda s: set_entry(s, x="NESTED"), "recursion limit"),
    "infinite shape": (lambda s: set_entry(s, shape=[float("inf")]), "expected value"),
    "shape of NaN": (lambda s: set_entry(s, shape=[float("nan")]), "expected value"),
    "broken shape": (lambda s: set_entry(s, shape=[1.5]), "floating point `1.5`, expected usize"),
    "shape as text": (lambda s: set_entry(s, shape=["1"]), 'string "1", expected usize'),
    "shape of many digits": (lambda s: set_entry(s, shape=["DIGITS"]), "number out of range"),
    "shape past 64 bits": (lambda s: set_entry(s, shape=[2**40, 2**40]), "overflow"),
    "negative offset": (lambda s: set_entry(s, data_offsets=[-4, 0]), "integer `-4`, expected usize"),
    "offsets turned round": (lambda s: set_entry(s, data_offsets=[4, 0]), "invalid offset"),
    "metadata as a list": (lambda s: edit_header(s, lambda h: h.update(__metadata__=[1])), "sequence, expected a map"),
    "nested config": (lambda s: (s / "config.json").write_text('{"a":' * 10**5), "config.json is no valid JSON"),
    "integer of many digits": (lambda s: set_config(s, {"a": "DIGITS"}), "config.json is no valid JSON"),
    "infinity in the config": (lambda s: set_config(s, {"rope_theta": float("inf")}, "text_config"), "Infinity"),
    "quantisation as text": (lambda s: set_config(s, {"quantization_config": "fp8"}), "config.json: .* 'fp8'"),
    "quantisation as a list": (lambda s: set_config(s, {"quantization_config": ["fp8"]}), r"config.json: .*\['fp8'\]"),
    "quantised text model": (lambda s: set_config(s, {"quantization_config": {}}, "text_config"), "a quantised source"),
    "tie as text": (
        lambda s: set_config(s, {"tie_word_embeddings": "false"}),
        "config.json: .* 'false' instead of true",
    ),
    "tie as a number": (lambda s: set_config(s, {"tie_word_embeddings": 0}, "text_config"), "is 0 instead of true or"),
    "mark as text": (
        lambda s: set_config(s, {"trained": "no"}),
        "config.json: trained is 'no' instead of true or false",
    ),
    "text model as a list": (lambda s: set_config(s, {"text_config": [1]}), "config.json has no text_config"),
    "rope as text": (
        lambda s: set_config(s, {"rope_scaling": "x"}, "text_config"),
        "rope_scaling is 'x' instead of an",
    ),
    "layers past the weights": (
        lambda s: set_config(s, {"num_hidden_layers": 10**30}, "text_config"),
        "tensors in all",
    ),
    "width as text": (lambda s: set_config(s, {"hidden_size": "wide"}, "text_config"), "does not describe a model"),
    "width past 64 bits": (
        lambda s: set_config(s, {"hidden_size": 10**30}, "vision_config"),
        "does not describe a model",
    ),
    "unknown activation": (lambda s: set_config(s, {"hidden_act": "x"}, "text_config"), "does not describe a model"),
    "token id as text": (lambda s: set_config(s, {"image_token_id": "x"}), "config.json: image_token_id is 'x'"),
    "end id in two lists": (
        lambda s: set_generation(s, {"eos_token_id": [[1]]}),
        "generation_config.json: eos_token_id",
    ),
    "end id as text": (
        lambda s: set_generation(s, {"eos_token_id": "x"}),
        "generation_config.json: eos_token_id is 'x'",
    ),
    "no end id in a list": (
        lambda s: set_generation(s, {"eos_token_id": []}),
        r"generation_config.json: eos_token_id is \[",
    ),
    "broken tokenizer settings": (
        lambda s: (s / "tokenizer_config.json").write_text("{"),
        "tokenizer_config.json is no",
    ),
    "broken image settings": (
        lambda s: (s / "preprocessor_config.json").write_text("[]"),
        "preprocessor_config.json hold",
    ),
    "word with a text as its id": (
        lambda s: cases.edit_json(s / "tokenizer.json", {"vocab": {"a": "x"}}, "model"),
        "no vocabulary of ids.*the id of 'a' is 'x'",
    ),
    "added token without an id": (
        lambda s: cases.edit_json(s / "tokenizer.json", {"added_tokens": [{"content": "x"}]}),
        "no vocabulary of ids: KeyError",
    ),
    "wrong architecture": (lambda s: set_config(s, {"model_type": "qwen2_5_vl"}), "model_type 'qwen2_5_vl'"),
    "no architecture": (lambda s: set_config(s, {"model_type": None}), "model_type None"),
    "mixture of experts": (lambda s: set_config(s, {"model_type": "qwen3_vl_moe"}), "qwen3_vl_moe.*dense"),
    "quantised": (lambda s: set_config(s, {"quantization_config": {"quant_method": "fp8"}}), "quant_method 'fp8'"),
    "no vision tower": (lambda s: set_config(s, {"vision_config": None}), "no vision_config"),
    "no config": (lambda s: (s / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda s: (s / "config.json").write_text("{"), "no valid JSON"),
    "no weights": (lambda s: shard(s).unlink(), "neither model.safetensors nor"),
    "pickled weights": (lambda s: rename(s, "model.safetensors", "pytorch_model.bin"), "other formats are not read"),
    "file and index": (lambda s: (s / INDEX).write_text("{}"), "has both"),
    "no tokenizer": (lambda s: [(s / f).unlink() for f in ("tokenizer.json", "vocab.json")], "no tokenizer.json or"),
    "empty tokenizer": (lambda s: (s / "tokenizer.json").write_text("{}"), "no vocabulary of ids"),
    "no image settings": (lambda s: (s / "preprocessor_config.json").unlink(), "no preprocessor_config.json or"),
}

SHARD_FAULTS = {
    "truncated last shard": (lambda s: cut(s, -1), "00003-of-00003.safetensors is truncated"),
    "missing shard": (lambda s: shard(s, 1).unlink(), "00002-of-00003.safetensors is missing"),
    "missing index entry": (lambda s: edit_weight_map(s, {NORM: None}), f"{NORM} is in .* says None"),
    "wrong index entry": (lambda s: edit_weight_map(s, {NORM: shard(s, 1).name}), f"{NORM} is in"),
    "index entry without tensor": (lambda s: edit_weight_map(s, {"ghost": shard(s).name}), "places ghost in"),
    "index to another folder": (lambda s: edit_weight_map(s, {NORM: "../model.safetensors"}), "no weight_map"),
    "index without map": (lambda s: (s / INDEX).write_text("{}"), "no weight_map"),
    "duplicate tensor in two shards": (copy_tensor_to_other_shard, "duplicate tensor .*00001-of-.* and .*00002-of-"),
}

BAD_ARGUMENTS = {
    "block size 0": ({"block_size": 0}, "block_size must be a positive integer, got 0"),
    "block size -4": ({"block_size": -4}, "got -4"),
    "block size True": ({"block_size": True}, "got True"),
    "block size as text": ({"block_size": "4"}, "got '4'"),
    "mask id past the vocabulary": ({"mask_token_id": 448}, "0 to 447, got 448"),
    "default mask id past the vocabulary": ({"mask_token_id": None}, "got 151671"),
    "negative mask id": ({"mask_token_id": -1}, "got -1"),
    "mask id of the image token": ({"mask_token_id": 396}, "396 is the image_token_id"),
    "mask id of a word": ({"mask_token_id": 7}, r"7 is a word of the tokenizer \(.*\); 410 is free"),
    "mask id of an added token": ({"mask_token_id": 400}, r"400 is a token added to the tokenizer \(.*\); 410 is free"),
    "mask id as text": ({"mask_token_id": "447"}, "got '447'"),
    "mask id True": ({"mask_token_id": True}, "got True"),
    "block size past the positions": ({"block_size": 10**30}, "at most the model's 4096 positions, got 10"),
    "mask row": ({"mask_row": "zero"}, "'keep' or 'mean', got 'zero'"),
    "revision of a folder": ({"revision": "main"}, "needs a Hub id"),
    "upload target": ({"push_to_hub": "nonsense"}, "must be a repository id"),
}


@pytest.fixture(params=[pytest.param((f, False), id=n) for n, f in SINGLE_FILE_FAULTS.items()]
    + [pytest.param((f, True), id=n) for n, f in SHARD_FAULTS.items()])  # fmt: skip
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A damaged source, and the error that names the damage."""
    (damage, message), is_sharded = request.param
    source = cases.write_source(tmp_path / "source", shard_size="500KB" if is_sharded else None)
    damage(source)
    return source, message


def test_damaged_source_is_refused_before_any_write(damaged: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, message = damaged
    monkeypatch.setattr(converter, "write_and_verify", lambda *_: pytest.fail("wrote before all checks"))
    with pytest.raises(ConversionError, match=message):
        cases.convert(source, source.parent / "out")
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def spots(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield content, key
        yield from spots(content[key])


@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json", "chat_template.json", "a header"])
def test_random_damage_gives_no_other_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd values and odd bytes anywhere in the source's JSON: converted, or refused by an error of the converter."""
    monkeypatch.setattr(converter, "write_and_verify", lambda *_: None)
    source, rng, refused = cases.write_source(tmp_path / "source", shard_size="500KB"), random.Random(0), 0
    header, data = cases.read_shard(shard(source))
    text = json.dumps(header) if name == "a header" else (source / name).read_text()
    odd_values = [None, "x", -1, 0, 1.5, [], {}, [1], {"a": 1}, True, 10**30]
    for trial in range(thorough.cases(75)):
        content = json.loads(text)
        container, key = rng.choice(list(spots(content)))
        container[key] = rng.choice(odd_values)
        damage = bytearray(json.dumps(content).encode())
        if trial % 3 == 0:
            damage[rng.randrange(len(damage))] = rng.randrange(256)
        if name == "a header":
            cases.write_shard(shard(source), bytes(damage), data)
        else:
            (source / name).write_bytes(damage)
        try:
            shutil.rmtree(cases.convert(source, tmp_path / "out"))
        except ConversionError:
            refused += 1
    assert refused


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_argument_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    with pytest.raises(ConversionError, match=message):
        cases.convert(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_source_that_is_neither_folder_nor_hub_id(tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "absent", "../absent", "./absent", "a--b/absent", "é/absent", "a/b/absent"):
        with pytest.raises(ConversionError, match="neither a folder nor a Hub id"):
            cases.convert(name, tmp_path / "new" / "folders" / "out")
    assert list(tmp_path.iterdir()) == []


def test_root_as_the_output(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="/ exists already"):
        cases.convert(cases.write_source(tmp_path / "source"), Path("/"))


def test_bard_vl_source_whose_name_hides_the_block_size(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "my-model")
    cases.edit_json(source / "config.json", {"model_type": "bard_vl"})
    with pytest.raises(ConversionError, match="my-model does not say its block size"):
        cases.convert(source, tmp_path / "out")


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json", "vocab.json"])
def test_mask_id_is_no_token_wherever_it_was_added(file: str, tmp_path: Path) -> None:
    """A token of any of the tokenizer's files; the last file alone is that of a tokenizer in the older files."""
    source = cases.write_source(tmp_path / "source")
    content = cases.read_json(source / file) if (source / file).exists() else {}
    if file == "tokenizer.json":
        content["added_tokens"].append({**content["added_tokens"][-1], "id": cases.MASK, "content": "<label>"})
    elif file == "tokenizer_config.json":
        content["added_tokens_decoder"][str(cases.MASK)] = {"content": "<label>"}
    else:
        content["<label>"] = cases.MASK
    (source / file).write_text(json.dumps(content))
    if file == "vocab.json":
        (source / "tokenizer.json").unlink()
    free = r"mask_token_id 447 is a (token added to|word of) the tokenizer \('<label>'\); 410 is free"
    with pytest.raises(ConversionError, match=free):
        cases.convert(source, tmp_path / "out")
    assert (
        cases.read_json(cases.convert(source, tmp_path / "out", mask_token_id=410) / "config.json")["mask_token_id"]
        == 410
    )


def test_code_files_must_lie_beside_the_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cases.write_source(tmp_path / "source")
    monkeypatch.setattr(converter, "CODE_FOLDER", tmp_path)
    with pytest.raises(ConversionError, match=r"configuration_bard_vl\.py is missing"):
        cases.convert(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder with files", "empty folder", "file", "dangling link"])
def test_existing_output_is_never_touched(kind: str, tmp_path: Path) -> None:
    source, output = cases.write_source(tmp_path / "source"), tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    elif kind == "dangling link":
        output.symlink_to(tmp_path / "nowhere")
    else:
        output.mkdir()
    if kind == "folder with files":
        (output / "config.json").write_text("mine")
    with pytest.raises(ConversionError, match="exists already"):
        cases.convert(source, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert kind != "folder with files" or (output / "config.json").read_text() == "mine"


@pytest.mark.parametrize("parent", ["/proc/self", "/sys/kernel", "a file"])
def test_target_that_cannot_be_written(parent: str, tmp_path: Path) -> None:
    """These refuse the superuser too, unlike permission bits."""
    source = cases.write_source(tmp_path / "source")
    (tmp_path / "a file").touch()
    output = tmp_path / parent / "out"
    with pytest.raises(ConversionError, match=f"cannot convert .* to {output}: "):
        cases.convert(source, output)


def test_too_little_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cases.write_source(tmp_path / "source")
    usage = type("usage", (), {"free": 10**6})
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConversionError, match="has 1 MB free, the output needs 3 MB"):
        cases.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("limit", [100, 30_000, 700_000])
@pytest.mark.process
def test_write_that_fails_midway_leaves_nothing(limit: int, tmp_path: Path) -> None:
    """A limit on file sizes stops `write` as a full disk does."""
    source = cases.write_source(tmp_path / "source")
    errors = tmp_path / "errors"
    process = cases.start(source, tmp_path / "out", "--quiet", errors=errors, limit=limit)
    process.join(60)
    assert process.exitcode == 1
    assert "error: cannot convert" in errors.read_text()
    assert "File too large" in errors.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors", "source"]


@pytest.mark.parametrize("call", [1, 2, 10, 22])
def test_disk_full_when_syncing_leaves_nothing(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, fsync, calls = cases.write_source(tmp_path / "source"), os.fsync, iter(range(1, 1000))

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConversionError, match="No space left on device"):
        cases.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("target", ["model.safetensors", "tokenizer.json", "config.json", "stray"])
def test_verification_sees_every_changed_byte(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sync = cases.write_source(tmp_path / "source"), converter.sync

    def spoil(folder: Path) -> None:
        path = folder / target
        content = path.read_bytes() if path.exists() else b"?"
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        sync(folder)

    monkeypatch.setattr(converter, "sync", spoil)
    with pytest.raises(ConversionError, match="verification failed"):
        cases.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_source_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan = cases.write_source(tmp_path / "source"), converter.plan_shards

    def shrink(*args: Any) -> Any:
        cut(source, -1000)
        return plan(*args)

    monkeypatch.setattr(converter, "plan_shards", shrink)
    with pytest.raises(ConversionError, match="ended while"):
        cases.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_interrupt_from_the_keyboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = cases.write_source(tmp_path / "source")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converter, "sync", interrupt)
    assert converter.main(cases.command(source, tmp_path / "out", "--quiet")[2:]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder that another process may be writing, moving or removing."""
    size = 0
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            size += path.stat().st_size
    return size


@pytest.mark.process
def test_kill_at_random_moments(tmp_path: Path) -> None:
    """12 kills, by the clock and by the bytes written: the output is absent or complete, the next run starts clean."""
    source = cases.write_source(tmp_path / "source", shard_size="8MB", intermediate_size=16_384)
    folder, options = tmp_path / "outputs", ("--quiet",)
    start = time.monotonic()
    reference = cases.start(source, folder / "reference", *options)
    reference.join()
    assert reference.exitcode == 0
    duration = time.monotonic() - start
    expected = cases.file_digests(folder / "reference")
    total = size_of(folder / "reference")
    shutil.rmtree(folder / "reference")
    # The card names the output; the same name keeps its bytes comparable.
    output, rng = folder / "reference", random.Random(0)
    outcomes: Counter[str] = Counter()
    for kill in range(12):
        process = cases.start(source, output, *options)
        if kill % 2:
            time.sleep(duration * (0.2 + 0.9 * (kill + rng.random()) / 12))
        else:  # however fast the machine is just now, some of the kills fall into the writing
            share = total * kill / 12
            while process.is_alive() and size_of(folder / ".reference.partial") <= share:
                time.sleep(0.001)
        process.kill()
        process.join()
        names = {path.name for path in folder.iterdir()}
        assert names <= {"reference", ".reference.lock", ".reference.partial"}
        outcomes["complete" if output.exists() else "partial" if ".reference.partial" in names else "nothing"] += 1
        if output.exists():
            assert cases.file_digests(output) == expected
            shutil.rmtree(output)
    assert outcomes["partial"] >= 3, outcomes
    cases.convert(source, output)
    assert cases.file_digests(output) == expected
    assert [path.name for path in folder.iterdir()] == ["reference"]


def test_leftover_of_a_killed_run_beside_a_finished_output(tmp_path: Path) -> None:
    """Killed between renaming and unlocking: the next run still refuses, and takes the free lock file away."""
    source = cases.write_source(tmp_path / "source")
    cases.convert(source, tmp_path / "out")
    (tmp_path / ".out.lock").touch()
    with pytest.raises(ConversionError, match="exists already"):
        cases.convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_second_conversion_to_the_same_output_is_refused(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source")
    with converter.exclusive_folder(tmp_path / "out") as partial:
        (partial / "of the first").touch()
        with pytest.raises(ConversionError, match="another conversion is writing"):
            cases.convert(source, tmp_path / "out")
        assert [path.name for path in partial.iterdir()] == ["of the first"]
        cases.convert(source, tmp_path / "other")


@pytest.mark.process
def test_conversions_at_once_have_one_winner(tmp_path: Path) -> None:
    source = cases.write_source(tmp_path / "source", intermediate_size=2048)
    for round_number in range(3):
        output = tmp_path / f"out{round_number}"
        (tmp_path / "errors").mkdir(exist_ok=True)
        files = [tmp_path / "errors" / str(number) for number in range(3)]
        runs = [cases.start(source, output, "--quiet", errors=file) for file in files]
        for run in runs:
            run.join(60)
        assert sorted(str(run.exitcode) for run in runs) == ["0", "1", "1"]
        losers = [file.read_text() for run, file in zip(runs, files, strict=True) if run.exitcode]
        assert all("another conversion is writing" in error or "exists already" in error for error in losers), losers
        assert cases.tensor_bytes(output) == cases.tensor_bytes(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors", "out0", "out1", "out2", "source"]


def test_lock_file_removed_between_open_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a file that is no longer at its path excludes nobody, and does not count."""
    source, flock = cases.write_source(tmp_path / "source"), fcntl.flock
    (tmp_path / ".out.lock").touch()

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".out.lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ConversionError, match="another conversion is writing"):
        cases.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_lock_file_of_the_next_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run removes its lock file before it gives the lock back: then the path may be another run's."""
    unlink = Path.unlink

    def unlink_and_make(path: Path) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        path.unlink()
        path.touch()

    with converter.exclusive_folder(tmp_path / "out"):
        monkeypatch.setattr(Path, "unlink", unlink_and_make)
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
