"""Convert a Qwen3-VL checkpoint (or a published Bard-VL one without code) to a complete Bard-VL repository folder.

    python convert_qwen3vl_to_bard.py --source Qwen/Qwen3-VL-4B-Instruct --output Bard-VL-4B --block-size 4

Weights are copied as bytes, 16 MiB at a time, so neither the model nor torch is loaded (`--mask-row mean` alone needs
torch). The work, in order:
1. check everything about the source: architecture, headers, index, names, shapes, dtypes;
2. write weights, tokenizer and processor files, code, model card and settings into a hidden sibling of the output;
3. read all of it back and compare SHA-256 sums with those of the source's bytes;
4. rename the folder once. Until then nothing exists under the output's name; what a killed run leaves is hidden,
   has no lock on it, and is removed by the next run.
File locks and directory syncs are POSIX: Linux and macOS.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, snapshot_download
from tqdm import tqdm

CODE_FOLDER = Path(__file__).resolve().parent
CHUNK_SIZE = 16 * 2**20  # bytes held at a time
MAX_HEADER_SIZE = 100_000_000  # the safetensors library reads no longer header
DTYPE_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
DEFAULT_BLOCK_SIZE = 4  # the anchor, where training from autoregressive weights starts
DEFAULT_MASK_TOKEN_ID = 151_671
# Greedy, which is what no temperature means; a stated 0 makes transformers' loader warn.
GENERATION_SETTINGS = {
    "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": 0.9,
    "max_new_tokens": 256,
}
MODEL_CLASS = "modeling_bard_vl.BardVLForConditionalGeneration"
MODEL_AUTO_CLASSES = (
    *("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"),
    "AutoModelForMultimodalLM",  # known to transformers 5, ignored by 4.57
)
AUTO_MAP = {"AutoConfig": "configuration_bard_vl.BardVLConfig", **dict.fromkeys(MODEL_AUTO_CLASSES, MODEL_CLASS)}
PROCESSOR_SETTINGS = {
    "processor_class": "BardVLProcessor",
    "auto_map": {"AutoProcessor": "processing_bard_vl.BardVLProcessor"},
}
COPIED_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", ".gitattributes"),
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Folders named like a release are taken for it; any other folder's card names no base model.
RELEASES = {
    r"Qwen3-VL-\d+B-(Instruct|Thinking)": "Qwen",
    r"Bard-VL-B\d+-Mask-\d+B(-Distil)?-Instruct": "fudan-generative-ai",
}
BLOCK_SIZE_IN_NAME = re.compile(r"Bard-VL-B(\d+)", re.IGNORECASE)
OPENS_THINKING = re.compile(r"<\|im_start\|>assistant(\\n|\n)<think>")


class ConversionError(ValueError):
    """The conversion was refused or failed; nothing was left under the output's name."""


@dataclass(frozen=True)
class Tensor:
    """One tensor's entry in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int  # byte offset in the file
    size: int  # bytes


@dataclass(frozen=True)
class RowEdit:
    """Bytes to write over one row of a tensor, at a byte offset from the tensor's start."""

    offset: int
    content: bytes


@dataclass
class Conversion:
    """What is known about one conversion before its first byte is written."""

    folder: Path  # the source's
    name: str  # Hub id where known, else the folder's name
    hub_id: str | None
    commit: str | None
    config: dict[str, Any]  # the source's
    block_size: int = 0
    mask_token_id: int = 0
    tensors: list[Tensor] = field(default_factory=list)
    edits: dict[str, RowEdit] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_bard(self) -> bool:
        """Whether the source is a Bard-VL checkpoint already."""
        return self.config["model_type"] == "bard_vl"


def convert(
    source: str | Path,
    output: str | Path,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    mask_row: str = "keep",
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    progress: bool = True,
) -> Path:
    """Convert `source`, a folder or a Hub id, into the new folder `output`, and return its path.

    Args:
        source: dense Qwen3-VL (2B, 4B, 8B, 32B; Instruct or Thinking), or a Bard-VL checkpoint with or without code.
        output: must not exist yet; missing parent folders are made.
        block_size: in tokens. Default: what the source's config states, else the number after B in a Bard-VL name,
            else, for Qwen3-VL, 4 (the anchor).
        mask_token_id: default: what the source's config states, else 151671, an unused row of Qwen3-VL's embedding.
        mask_row: "keep" leaves the mask token's embedding as it is; "mean" writes the mean over every token that the
            tokenizer defines, the mask token aside (Qwen3-VL: ids 0 to 151,668; the rows above were never trained).
            With untied embeddings the output row is treated alike.
        max_shard_size: bytes, or a string as "5GB" (10^9) or "500MiB" (2^20); no written shard is larger.
        revision: branch, tag or commit of a Hub source.
        push_to_hub: repository id to upload the finished folder to.
        private: visibility of a repository that the upload creates; None takes the account's default.
        progress: show a progress bar and print notes and a summary.

    Raises:
        ConversionError: a bad argument or source, an existing output, a concurrent conversion to the same output, a
            full or read-only disk, a checksum that differs, a failed upload (only then does `output` exist).
    """
    if mask_row not in ("keep", "mean"):
        raise ConversionError(f"mask_row must be 'keep' or 'mean', got {mask_row!r}")
    if push_to_hub is not None and not HUB_ID.fullmatch(push_to_hub):
        raise ConversionError(f"push_to_hub must be a repository id such as me/Bard-VL-4B, got {push_to_hub!r}")
    shard_limit = parse_size(max_shard_size)
    output = Path(os.path.abspath(output))
    try:
        with exclusive_folder(output) as partial:
            job = prepare(source, revision, block_size, mask_token_id, mask_row)
            shards = plan_shards(job.tensors, shard_limit)
            texts = output_texts(job, push_to_hub or output.name)
            for note in job.notes if progress else ():
                print(f"note: {note}")
            write_and_verify(partial, job, shards, texts, progress)
            os.rename(partial, output)
            sync(output.parent)
    except OSError as error:
        raise ConversionError(f"cannot convert {source} to {output}: {error}") from error
    if progress:
        print(summary(job, output, len(shards)))
    if push_to_hub:
        upload(output, push_to_hub, private)
    return output


def prepare(
    source: str | Path, revision: str | None, block_size: int | None, mask_token_id: int | None, mask_row: str
) -> Conversion:
    """Find the source and check all of it, without writing."""
    job = locate(source, revision)
    check_architecture(job.config)
    check_companions(job.folder)
    tied = is_tied(job.config)
    shapes = expected_shapes(job.config, tied)
    job.block_size = choose_block_size(job, block_size)
    job.mask_token_id = choose_mask_token_id(job.config, mask_token_id)
    vocabulary, added_ids = tokenizer_ids(job.folder)
    if job.mask_token_id in vocabulary:
        raise ConversionError(f"mask_token_id {job.mask_token_id} is a word of the tokenizer; choose an unused id")
    tensors = read_tensors(job.folder)
    if tied and "lm_head.weight" in tensors:
        drop_tied_head(tensors)
        job.notes.append("lm_head.weight repeats the tied embeddings, and is left out")
    check_tensors(tensors, shapes)
    job.tensors = list(tensors.values())
    if mask_row == "mean":
        token_ids = (vocabulary | added_ids) - {job.mask_token_id}
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                job.edits[name] = mean_row(tensors[name], token_ids, job.mask_token_id)
    if "thinking" in job.name.lower() or OPENS_THINKING.search(chat_template(job.folder)[0] or ""):
        job.notes.append(
            "a Thinking source: its chat template opens every answer with <think>, and the reasoning is long; generate "
            "with a larger max_new_tokens than the default of 256. Published Bard-VL checkpoints start from Instruct"
        )
    return job


# --- The source -------------------------------------------------------------------------------------------------------


def locate(source: str | Path, revision: str | None) -> Conversion:
    """Find the source's folder, downloading it if `source` is a Hub id, with its name, commit and config."""
    folder = Path(source)
    if not folder.is_dir():
        folder = download(str(source), revision)
    elif revision is not None:
        raise ConversionError(f"revision {revision!r} needs a Hub id as the source, {source} is a folder")
    name = Path(os.path.abspath(folder)).name
    hub_id: str | None = None
    commit: str | None = None
    snapshot = folder.resolve()
    if snapshot.parent.name == "snapshots" and snapshot.parents[1].name.startswith("models--"):
        hub_id, commit = snapshot.parents[1].name.removeprefix("models--").replace("--", "/"), snapshot.name
    else:
        owners = (owner for pattern, owner in RELEASES.items() if re.fullmatch(pattern, name))
        hub_id = next((f"{owner}/{name}" for owner in owners), None)
    return Conversion(folder, hub_id or name, hub_id, commit, read_json(folder / "config.json"))


def download(repo: str, revision: str | None) -> Path:
    """Fetch a Hub repository into the Hub's cache; its config first, to refuse before gigabytes of weights."""
    if not HUB_ID.fullmatch(repo):
        raise ConversionError(f"source {repo!r} is neither a folder nor a Hub id such as Qwen/Qwen3-VL-4B-Instruct")
    small = [*COPIED_FILES, "config.json", "generation_config.json", "processor_config.json", "README.md"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small))
        check_architecture(read_json(folder / "config.json"))
        return Path(snapshot_download(repo, revision=folder.name, allow_patterns=["model*.safetensors*"]))
    except OSError as error:  # the base of huggingface_hub's errors
        raise ConversionError(f"cannot fetch {repo} (revision {revision or 'main'}) from the Hub: {error}") from error


def check_architecture(config: dict[str, Any]) -> None:
    """Refuse by name whatever is no dense, unquantised Qwen3-VL or Bard-VL."""
    model_type = config.get("model_type")
    if model_type == "qwen3_vl_moe":
        raise ConversionError(
            "qwen3_vl_moe: Qwen3-VL's mixture-of-experts models have no Bard-VL form, take a dense one"
        )
    if model_type not in ("qwen3_vl", "bard_vl"):
        raise ConversionError(f"model_type {model_type!r} cannot be converted; it must be qwen3_vl or bard_vl")
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise ConversionError(f"config.json has no {part}")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config["text_config"].get(key) or {}, dict):
            raise ConversionError(f"config.json: {key} is {config['text_config'][key]!r} instead of an object")
    quantization = config.get("quantization_config") or config["text_config"].get("quantization_config")
    if quantization:
        refuse_quantised(f"quantization_config with quant_method {quantization.get('quant_method')!r}")


def refuse_quantised(what: str) -> None:
    """Raise the error of FP8 and other quantised sources."""
    raise ConversionError(f"a quantised source ({what}): convert the bfloat16 release, and quantise when loading it")


def check_companions(folder: Path) -> None:
    """Refuse a source or an installation that lacks the files without which the output would not load."""
    needed = (("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json"))
    for names in needed:
        if not any((folder / name).is_file() for name in names):
            raise ConversionError(
                f"{folder} has no {' or '.join(names)}: put the base model's files beside its weights"
            )
    for module in sorted({name.split(".")[0] for name in (*AUTO_MAP.values(), "processing_bard_vl.")}):
        if not (CODE_FOLDER / f"{module}.py").is_file():
            raise ConversionError(f"{module}.py is missing beside {Path(__file__).name}: run it from a full checkout")


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output matrix is the embedding; transformers 4 reads the text level, 5 the outer one."""
    return bool(config["text_config"].get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def choose_block_size(job: Conversion, block_size: int | None) -> int:
    """Take the block size from the argument, the source's config, its name, or the default, in this order."""
    trained: int | None = DEFAULT_BLOCK_SIZE
    if job.is_bard:
        named = BLOCK_SIZE_IN_NAME.search(job.name)
        trained = job.config.get("block_size", int(named[1]) if named else None)
    chosen = trained if block_size is None else block_size
    if chosen is None:
        raise ConversionError(f"{job.name} does not say its block size: pass block_size, the size it was trained with")
    if isinstance(chosen, bool) or not isinstance(chosen, int) or chosen < 1:
        raise ConversionError(f"block_size must be a positive integer, got {chosen!r}")
    if job.is_bard and trained is not None and chosen != trained:
        job.notes.append(f"block size {chosen} as asked, although the source was trained with {trained}")
    return chosen


def choose_mask_token_id(config: dict[str, Any], mask_token_id: int | None) -> int:
    """Take the mask id from the argument, the source's config, or the default; it must be a free embedding row."""
    vocab_size = config["text_config"]["vocab_size"]
    chosen = config.get("mask_token_id", DEFAULT_MASK_TOKEN_ID) if mask_token_id is None else mask_token_id
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < vocab_size:
        raise ConversionError(f"mask_token_id must lie in the vocabulary, 0 to {vocab_size - 1}, got {chosen!r}")
    for part in (config, config["text_config"]):
        for key, value in part.items():
            used = value if isinstance(value, list) else [value]
            if key.endswith("_token_id") and key != "mask_token_id" and chosen in used:
                raise ConversionError(f"mask_token_id {chosen} is the {key} of the source")
    return chosen


# --- Tensors ----------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the headers of all shards, in the order of the data, and check them against the index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise ConversionError(f"{folder} has both {single.name} and {index.name}: remove the one that is stale")
    if single.is_file():
        return {tensor.name: tensor for tensor in read_header(single)}
    if not index.is_file():
        raise ConversionError(f"{folder} has neither {single.name} nor {index.name}; other formats are not read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(Path(str(name)).name == name for name in weight_map.values()):
        raise ConversionError(f"{index} has no weight_map from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        for tensor in read_header(folder / shard):
            if tensor.name in tensors:
                raise ConversionError(
                    f"duplicate tensor {tensor.name}: in {tensors[tensor.name].path.name} and {shard}"
                )
            tensors[tensor.name] = tensor
    for name, tensor in tensors.items():
        if weight_map.get(name) != tensor.path.name:
            raise ConversionError(f"{name} is in {tensor.path.name}, but {index.name} says {weight_map.get(name)}")
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ConversionError(f"{index.name} places {name} in {shard}, which has no such tensor")
    return tensors


def read_header(path: Path) -> list[Tensor]:
    """Read a safetensors header; the tensors must fill the file from header to end without gap or overlap."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing")
    file_size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(file_size - 8, MAX_HEADER_SIZE):
            raise ConversionError(f"{path} is truncated or no safetensors file: {file_size} bytes, header of {length}")
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    tensors = [parse_entry(name, entry, path, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            raise ConversionError(f"{path}: {tensor.name} starts at byte {tensor.start} instead of {position}")
        position += tensor.size
    if position != file_size:
        raise ConversionError(f"{path} is truncated or overlong: {file_size} bytes, its header describes {position}")
    return tensors


def parse_entry(name: str, entry: Any, path: Path, data_start: int) -> Tensor:
    """Check one header entry: a known dtype, and as many bytes as dtype and shape need."""
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        start, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{path}: the header entry of {name} is malformed: {entry!r}") from error
    if dtype.startswith("F8") or name.endswith(("weight_scale_inv", "weight_scale")):
        refuse_quantised(f"{name} in {path.name} has dtype {dtype}")
    if dtype not in DTYPE_SIZES:
        raise ConversionError(
            f"{path}: {name} has the unknown dtype {dtype!r}, expected one of {', '.join(DTYPE_SIZES)}"
        )
    size = math.prod(shape) * DTYPE_SIZES[dtype]
    if min(shape, default=0) < 0 or start < 0 or end - start != size:
        raise ConversionError(f"{path}: {name} of shape {list(shape)} and dtype {dtype} cannot lie in {start} to {end}")
    return Tensor(name, dtype, shape, path, data_start + start, size)


def expected_shapes(config: dict[str, Any], tied: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Qwen3-VL model with this config has."""
    try:
        shapes = {f"model.language_model.{name}": shape for name, shape in text_shapes(config["text_config"]).items()}
        shapes.update({f"model.visual.{name}": shape for name, shape in vision_shapes(config["vision_config"]).items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"config.json does not describe a model: {error!r}") from error
    if not tied:
        shapes["lm_head.weight"] = shapes["model.language_model.embed_tokens.weight"]
    for name, shape in shapes.items():
        if not all(isinstance(size, int) and size > 0 for size in shape):
            raise ConversionError(f"config.json does not describe a model: {name} would have shape {list(shape)}")
    return shapes


def text_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the language model."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    query, key = heads * head, (config.get("num_key_value_heads") or heads) * head
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    projections = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
    for name, shape in projections.items():
        layer[f"self_attn.{name}_proj.weight"] = shape
        if config.get("attention_bias"):
            layer[f"self_attn.{name}_proj.bias"] = shape[:1]
    layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    layer |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    layer["mlp.down_proj.weight"] = (hidden, inner)
    shapes = {"embed_tokens.weight": (config["vocab_size"], hidden), "norm.weight": (hidden,)}
    return shapes | repeat("layers", config["num_hidden_layers"], layer)


def vision_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the vision tower with its merger and deepstack mergers."""
    hidden, inner, out = config["hidden_size"], config["intermediate_size"], config["out_hidden_size"]
    patch, merged = config["patch_size"], hidden * config["spatial_merge_size"] ** 2
    block = affine("norm1", hidden) | affine("norm2", hidden)
    block |= affine("attn.qkv", 3 * hidden, hidden) | affine("attn.proj", hidden, hidden)
    block |= affine("mlp.linear_fc1", inner, hidden) | affine("mlp.linear_fc2", hidden, inner)
    merger = affine("linear_fc1", merged, merged) | affine("linear_fc2", out, merged)
    shapes = affine("patch_embed.proj", hidden, config["in_channels"], config["temporal_patch_size"], patch, patch)
    shapes["pos_embed.weight"] = (config["num_position_embeddings"], hidden)
    shapes |= {f"merger.{name}": shape for name, shape in (affine("norm", hidden) | merger).items()}
    deepstack = len(config["deepstack_visual_indexes"])
    shapes |= repeat("deepstack_merger_list", deepstack, affine("norm", merged) | merger)
    return shapes | repeat("blocks", config["depth"], block)


def affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """Weight and bias of one module."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def repeat(name: str, count: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same tensors for each entry of a module list."""
    if count > 10_000:
        raise ValueError(f"{count} {name}")
    return {f"{name}.{index}.{key}": shape for index in range(count) for key, shape in shapes.items()}


def check_tensors(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with what the config demands."""
    for what, names in (("lacks", shapes.keys() - tensors.keys()), ("should not have", tensors.keys() - shapes.keys())):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ConversionError(f"by its config.json, the source {what} {len(names)} of its tensors: {first}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ConversionError(f"{name} has shape {list(tensor.shape)}, config.json asks for {list(shapes[name])}")


def drop_tied_head(tensors: dict[str, Tensor]) -> None:
    """Remove an output matrix that equals the tied embedding; one that differs contradicts the config."""
    head, embedding = tensors["lm_head.weight"], tensors.get("model.language_model.embed_tokens.weight")
    if embedding is not None and tensor_sha256(head) != tensor_sha256(embedding):
        raise ConversionError("lm_head.weight differs from the embedding although config.json ties the two")
    del tensors["lm_head.weight"]


def read_chunks(tensor: Tensor, chunk_size: int = 0) -> Iterator[tuple[int, memoryview]]:
    """Yield a tensor's bytes as (offset, view); each view is overwritten by the next one."""
    buffer = memoryview(bytearray(min(chunk_size or CHUNK_SIZE, tensor.size)))
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        for offset in range(0, tensor.size, len(buffer) or 1):
            view = buffer[: tensor.size - offset]
            if file.readinto(view) != len(view):
                raise ConversionError(f"{tensor.path} ended while {tensor.name} was read")
            yield offset, view


def tensor_sha256(tensor: Tensor, bar: Any = None) -> str:
    """SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    for _, view in read_chunks(tensor):
        digest.update(view)
        if bar is not None:
            bar.update(len(view))
    return digest.hexdigest()


def tokenizer_ids(folder: Path) -> tuple[set[int], set[int]]:
    """Ids of the tokenizer's vocabulary, and those of the tokens added to it."""
    try:
        if (folder / "tokenizer.json").is_file():
            content = read_json(folder / "tokenizer.json")
            return set(content["model"]["vocab"].values()), {token["id"] for token in content.get("added_tokens", [])}
        added = folder / "added_tokens.json"
        added_ids = set(read_json(added).values()) if added.is_file() else set()
        return set(read_json(folder / "vocab.json").values()), added_ids
    except (KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"the tokenizer in {folder} has no vocabulary of ids: {error!r}") from error


def mean_row(tensor: Tensor, token_ids: Iterable[int], row: int) -> RowEdit:
    """The edit that sets `row` to the mean of the rows `token_ids`, accumulated in float64, in the tensor's dtype."""
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    dtype, (num_rows, width) = dtypes[tensor.dtype], tensor.shape
    is_used = torch.zeros(num_rows, dtype=torch.bool)
    is_used[[token_id for token_id in token_ids if token_id < num_rows]] = True
    row_size = width * DTYPE_SIZES[tensor.dtype]
    total = torch.zeros(width, dtype=torch.float64)
    for offset, view in read_chunks(tensor, max(1, CHUNK_SIZE // row_size) * row_size):
        rows = torch.frombuffer(view, dtype=dtype).view(-1, width)
        first = offset // row_size
        total += rows[is_used[first : first + len(rows)]].sum(0, dtype=torch.float64)
    mean = (total / is_used.sum()).to(dtype)
    return RowEdit(row * row_size, bytes(mean.view(torch.uint8).tolist()))


# --- The output -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive_folder(output: Path) -> Iterator[Path]:
    """Give an empty hidden sibling of `output` to this process alone; what is not renamed by the end is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lock_path, partial = output.with_name(f".{output.name}.lock"), output.with_name(f".{output.name}.partial")
    lock = take_lock(lock_path, output)
    try:
        if os.path.lexists(output):
            raise ConversionError(f"{output} exists already: remove it or choose another output")
        if partial.exists():  # a run was killed: its lock is free
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        os.close(lock)


def take_lock(path: Path, output: Path) -> int:
    """Lock a file, made if need be. The kernel frees the lock when its process ends, however it ends."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise ConversionError(f"another conversion is writing {output}") from None
        except FileNotFoundError:
            pass
        os.close(lock)  # its last holder removed the file between our open and our lock: take the new one


def plan_shards(tensors: Iterable[Tensor], limit: int) -> list[list[Tensor]]:
    """Fill shards of at most `limit` bytes, headers included, in the source's order."""
    shards: list[list[Tensor]] = [[]]
    room = limit - 1024
    for tensor in tensors:
        cost = tensor.size + len(tensor.name) + 160  # an entry of the header is at most that long
        if cost > limit - 1024:
            raise ConversionError(f"max_shard_size of {limit} bytes has no room for {tensor.name}, {tensor.size} bytes")
        if cost > room:
            shards.append([])
            room = limit - 1024
        shards[-1].append(tensor)
        room -= cost
    return shards


def write_and_verify(
    partial: Path, job: Conversion, shards: list[list[Tensor]], texts: dict[str, str], progress: bool
) -> None:
    """Write every file of the output, config.json last, sync, read back and compare."""
    copies = output_copies(job.folder)
    total_size = sum(tensor.size for tensor in job.tensors)
    needed = total_size + sum(path.stat().st_size for path in copies.values()) + sum(map(len, texts.values())) + 2**20
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise ConversionError(
            f"{partial.parent} has {free / 1e6:,.0f} MB free, the output needs {needed / 1e6:,.0f} MB"
        )
    count = len(shards)
    names = [
        f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for i in range(1, count + 1)
    ]
    if count > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        texts = {"model.safetensors.index.json": to_json(index), **texts}
    with tqdm(total=2 * total_size, unit="B", unit_scale=True, desc="copying", disable=not progress) as bar:
        digests: dict[str, str] = {}
        for name, shard in zip(names, shards, strict=True):
            digests |= write_shard(partial / name, shard, job.edits, bar)
        files = {name: write_file(partial / name, path.read_bytes()) for name, path in copies.items()}
        files |= {name: write_file(partial / name, text.encode()) for name, text in texts.items()}
        sync(partial)
        bar.set_description("verifying")
        verify(partial, names, job.tensors, digests, files, bar)


def write_shard(path: Path, shard: list[Tensor], edits: dict[str, RowEdit], bar: Any) -> dict[str, str]:
    """Write one safetensors file, and return the SHA-256 that each tensor must have."""
    ordered = sorted(shard, key=lambda tensor: (-DTYPE_SIZES[tensor.dtype], tensor.name))  # keeps the data aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        digests = {tensor.name: copy_tensor(tensor, file, edits.get(tensor.name), bar) for tensor in ordered}
        finish(file)
    return digests


def copy_tensor(tensor: Tensor, file: BinaryIO, edit: RowEdit | None, bar: Any) -> str:
    """Append a tensor's bytes, with the row edit laid over the source's, and return the SHA-256 of the result."""
    digest = hashlib.sha256()
    for offset, view in read_chunks(tensor):
        if edit is not None:
            start, end = max(edit.offset, offset), min(edit.offset + len(edit.content), offset + len(view))
            if start < end:
                view[start - offset : end - offset] = edit.content[start - edit.offset : end - edit.offset]
        digest.update(view)
        file.write(view)
        bar.update(len(view))
    return digest.hexdigest()


def write_file(path: Path, content: bytes) -> str:
    """Write a small file, and return the SHA-256 that it must have."""
    with path.open("wb") as file:
        file.write(content)
        finish(file)
    return hashlib.sha256(content).hexdigest()


def finish(file: BinaryIO) -> None:
    """Bring a file to the disk, and drop it from the page cache so that verifying reads the disk."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(
    folder: Path, shards: list[str], tensors: list[Tensor], digests: dict[str, str], files: dict[str, str], bar: Any
) -> None:
    """Read the whole output back: each tensor's dtype, shape and SHA-256, each file's SHA-256, and no file more."""
    written = {tensor.name: tensor for shard in shards for tensor in read_header(folder / shard)}
    if written.keys() != {tensor.name for tensor in tensors}:
        raise ConversionError("verification failed: the written shards hold other tensors than the source")
    for tensor in tensors:
        copy = written[tensor.name]
        if (copy.dtype, copy.shape) != (tensor.dtype, tensor.shape) or tensor_sha256(copy, bar) != digests[tensor.name]:
            raise ConversionError(f"verification failed: {tensor.name} in {copy.path.name} differs from the source")
    for name, digest in files.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ConversionError(f"verification failed: {name} is not what was written")
    if {path.name for path in folder.iterdir()} != {*shards, *files}:
        raise ConversionError(f"verification failed: unexpected files in {folder}")


# --- The files beside the weights -------------------------------------------------------------------------------------


def output_copies(folder: Path) -> dict[str, Path]:
    """Files that are copied byte for byte, by their name in the output."""
    copies = {name: folder / name for name in COPIED_FILES if (folder / name).is_file()}
    if (CODE_FOLDER / "LICENSE").is_file():
        copies["LICENSE-CODE"] = CODE_FOLDER / "LICENSE"  # the code's licence is not that of the weights
    if (CODE_FOLDER / ".gitignore").is_file():
        copies[".gitignore"] = CODE_FOLDER / ".gitignore"  # what keeps caches and the like out of later uploads
    return copies | {path.name: path for path in sorted(CODE_FOLDER.glob("*_bard_vl.py"))}


def output_texts(job: Conversion, repo: str) -> dict[str, str]:
    """Files that are written, by their name; config.json is last, since loaders take it for the sign of a model."""
    texts = {"README.md": model_card(job, repo)}
    template, both_read_it = chat_template(job.folder)
    if template is None:
        job.notes.append("the source has no chat template, so neither has the output")
    elif not both_read_it:
        texts["chat_template.jinja"] = template
    processor = job.folder / "processor_config.json"
    settings = read_json(processor) if processor.is_file() else {}
    if not (job.folder / "preprocessor_config.json").is_file():
        job.notes.append(
            "the source's processor files were saved by transformers 5, and 4.57 cannot read them; "
            "to serve both, put the base model's original tokenizer and processor files into the source"
        )
    settings |= PROCESSOR_SETTINGS | {"mask_token_id": job.mask_token_id}
    texts["processor_config.json"] = to_json(settings)
    texts["generation_config.json"] = to_json(generation_config(job))
    texts["config.json"] = to_json(bard_config(job.config, job.block_size, job.mask_token_id))
    return texts


def chat_template(folder: Path) -> tuple[str | None, bool]:
    """The source's chat template, and whether its files give it to both the processor and the tokenizer.

    On every transformers line the processor reads chat_template.jinja and chat_template.json, the tokenizer
    chat_template.jinja and its own config.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8", errors="replace"), True
    files = (folder / "chat_template.json", folder / "tokenizer_config.json")
    for_processor, for_tokenizer = (read_json(f).get("chat_template") if f.is_file() else None for f in files)
    template = for_processor or for_tokenizer
    if not isinstance(template, str):
        return None, False
    return template, for_processor is not None and for_tokenizer is not None


def bard_config(config: dict[str, Any], block_size: int, mask_token_id: int) -> dict[str, Any]:
    """The output's config.json: the source's, with Bard-VL's settings and in the spelling that all versions read."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    # transformers 5 alone reads `rope_parameters`, both lines read the older pair; without a `rope_theta` they differ
    # in the default, of which Qwen3-VL's is 5,000,000.
    modern = dict(text.pop("rope_parameters", None) or {})
    rope = dict(text.get("rope_scaling") or modern)
    in_rope = rope.pop("rope_theta", modern.get("rope_theta", 5_000_000))
    text["rope_scaling"], text["rope_theta"] = rope, text.get("rope_theta", in_rope)
    tied = is_tied(config)
    text |= {"tie_word_embeddings": tied, "model_type": "qwen3_vl_text"}
    vision["model_type"] = "qwen3_vl"  # the spelling of 4.57, which 5.x corrects when it loads
    head: dict[str, Any] = {"model_type": "bard_vl", "architectures": [MODEL_CLASS.split(".")[1]], "auto_map": AUTO_MAP}
    head |= {"block_size": block_size, "mask_token_id": mask_token_id}
    parts = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    return head | {key: value for key, value in config.items() if key not in head} | parts


def generation_config(job: Conversion) -> dict[str, Any]:
    """The output's generation_config.json: the source's token ids, and greedy block decoding.

    Autoregressive sampling settings (temperature, top_p, top_k, penalties) are dropped: they were tuned for another
    decoding loop.
    """
    path = job.folder / "generation_config.json"
    source = read_json(path) if path.is_file() else {}
    ids = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = source.get(key, job.config["text_config"].get(key, job.config.get(key)))
        if value is not None:
            ids[key] = value
    return ids | GENERATION_SETTINGS


def model_card(job: Conversion, repo: str) -> str:
    """The output's README.md, with the metadata that the Hub reads."""
    readme = job.folder / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = dict(
        re.findall(r"^(license|license_name|license_link):[ \t]*(\S.*)$", front[1] if front else "", re.MULTILINE)
    )
    if "license" not in found:
        job.notes.append("the source's card states no licence: the output's says apache-2.0, Qwen3-VL's; check it")
    metadata = {"license": "apache-2.0", **found}
    metadata |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if job.hub_id:
        metadata |= {"base_model": job.hub_id, "base_model_relation": "finetune"}
    tags = "[custom_code, block-diffusion, diffusion-language-model, vision-language]"
    metadata |= {"language": "[en, zh]", "tags": tags}
    lines = chain(["---"], (f"{key}: {value}" for key, value in metadata.items()), ["---", ""])
    edits = f"the rows of the mask token in {' and '.join(job.edits)}, set to the mean of the vocabulary's rows"
    return "\n".join(lines) + CARD.format(
        title=repo.split("/")[-1],
        path=repo,
        name=job.name,
        commit=f" at commit `{job.commit}`" if job.commit else "",
        edits=f" except {edits}" if job.edits else "",
        state=(TRAINED if job.is_bard else SEEDED).format(block_size=job.block_size),
        licence=metadata["license"],
        block_size=job.block_size,
        mask_token_id=job.mask_token_id,
        **GENERATION_SETTINGS,
    )


SEEDED = """\
**These weights are a starting point, not a finished model.** They come from an autoregressive model and have not been
trained for block diffusion: until they are (block size {block_size}), `generate` gives no sensible text."""

TRAINED = """\
The source is a Bard-VL checkpoint; this folder adds code and settings to it. Decode with the block size that it was
trained with, here taken to be {block_size}."""

CARD = """
# {title}

A Bard-VL model: Qwen3-VL's architecture with block-causal attention, which fills blocks of masked tokens in parallel.
Converted from {name}{commit}; every tensor is byte for byte the source's{edits}.

{state}

## Quick start

`pip install "transformers>=4.57,<6" torch torchvision pillow`

```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "{path}"  # this folder, or its Hub id
device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, dtype=torch.bfloat16).to(device)
image = "https://qianwen-res.oss-cn-beijing.aliyuncs.com/Qwen-VL/assets/demo.jpeg"
content = [{{"type": "image", "url": image}}, {{"type": "text", "text": "Describe this image."}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
).to(device)
sequences = model.generate(**inputs, max_new_tokens={max_new_tokens})
response = sequences[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(response, skip_special_tokens=True)[0])
```

| setting | default | meaning |
| --- | --- | --- |
| `block_size` | {block_size} | tokens per block; stands in config.json, since a model is trained for it |
| `confidence_threshold` | {confidence_threshold} | a likelier token is kept; lower is faster (at block size 16: 0.5) |
| `remasking_strategy` | {remasking_strategy} | which masked tokens each step keeps |
| `temperature` | 0 | greedy; more samples |
| `max_new_tokens` | {max_new_tokens} | longest response |
| `mask_token_id` | {mask_token_id} | the row of the embedding that stands for a masked token |

The code runs with `trust_remote_code=True`: read the files, and pin a commit with `revision=`. The weights are under
the source's licence ({licence}); the code (`*_bard_vl.py`) is under the MIT licence.
"""


# --- Small things -----------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing")
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object, refusing a name that stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            raise ConversionError(f"{path}: duplicate {next(name for name in names if names.count(name) > 1)}")
        return result

    try:
        result = json.loads(content, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(result, dict):
        raise ConversionError(f"{path} holds a {type(result).__name__} instead of a JSON object")
    return result


def to_json(content: dict[str, Any]) -> str:
    """JSON as the Hub's repositories have it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5000000000, "5GB" or "500MiB"."""
    match = re.fullmatch(r"(\d+)\s*(?:([KMGT])(I?)B)?", str(size).strip().upper())
    if isinstance(size, bool) or not match or int(match[1]) < 1:
        raise ConversionError(f"max_shard_size must be bytes or a size such as 5GB, got {size!r}")
    base = 1024 if match[3] else 1000
    return int(match[1]) * base ** (" KMGT".index(match[2]) if match[2] else 0)


def summary(job: Conversion, output: Path, num_shards: int) -> str:
    """What was done, in a few lines."""
    size = sum(tensor.size for tensor in job.tensors)
    changed = ", ".join(f"row {job.mask_token_id} of {name}" for name in job.edits) or "none"
    return (
        f"converted {job.name} to {output}\n"
        f"  {len(job.tensors)} tensors, {size:,} bytes in {num_shards} shard(s), all verified by SHA-256\n"
        f"  block size {job.block_size}, mask token {job.mask_token_id}, changed rows: {changed}"
    )


def upload(folder: Path, repo: str, private: bool | None) -> None:
    """Create the Hub repository if need be, and upload the finished folder in one commit."""
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Bard-VL: weights, code and settings")
    except Exception as error:  # the HTTP client raises types of its own
        raise ConversionError(f"{folder} is complete, but its upload to {repo} failed: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns 0, or 1 after printing an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", required=True, help="Qwen3-VL or Bard-VL checkpoint: a folder or a Hub id")
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_argument("--block-size", type=int, help="tokens per block (default: the source's, else 4)")
    parser.add_argument(
        "--mask-token-id", type=int, help="embedding row of the mask (default: the source's, else 151671)"
    )
    parser.add_argument("--mask-row", choices=("keep", "mean"), default="keep", help="initial value of that row")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub source")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this repository")
    parser.add_argument("--private", action="store_true", default=None, help="make a repository created so private")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, notes or summary")
    options = vars(parser.parse_args(argv))
    try:
        convert(progress=not options.pop("quiet"), **options)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
