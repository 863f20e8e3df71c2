"""Convert a Qwen3-VL checkpoint (or a published Bard-VL one without code) to a complete Bard-VL repository folder.

    python convert_qwen3vl_to_bard.py --source Qwen/Qwen3-VL-4B-Instruct --output Bard-VL-4B --block-size 4

Files of weights are copied as bytes, 16 MiB at a time; no weight is loaded. The work, in order:
1. check the source: settings, tokenizer, headers, then names and shapes against the model on torch's meta device;
2. write weights, tokenizer and processor files, code, model card and settings into a hidden sibling of the output;
3. read all of it back and compare SHA-256 sums with those of the bytes that were to be written;
4. rename the folder once: until then nothing has the output's name. The next run removes what a killed one left.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

CODE_FOLDER = Path(__file__).resolve().parent
CHUNK_SIZE = 16 * 2**20  # bytes held at a time
DTYPE_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
DEFAULT_BLOCK_SIZE = 4  # the anchor, where training from autoregressive weights starts
DEFAULT_MASK_TOKEN_ID = 151_671
PUBLISHED_THRESHOLDS = {16: 0.5}  # by block size: what the authors of the published checkpoints recommend
MASK_ROWS = ("keep", "mean")
COPIED_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", ".gitattributes"),
)
# Folders named like a release are taken for it; any other folder's card names no base model.
PUBLISHER = "fudan-generative-ai"
RELEASES = {r"Qwen3-VL-\d+B-(Instruct|Thinking)": "Qwen", r"Bard-VL-B\d+-Mask-\d+B(-Distil)?-Instruct": PUBLISHER}
QUANTISATION = ("quantization_config", "compression_config")
QUANTISED = "a quantised source ({}): convert the bfloat16 release, and quantise when loading it"
OPENS_THINKING = re.compile(r"<\|im_start\|>assistant(\\n|\n)<think>")


class ConversionError(ValueError):
    """The conversion was refused or failed; nothing was left under the output's name."""


def require(condition: Any, message: str) -> None:
    """Refuse the conversion unless a condition holds."""
    if not condition:
        raise ConversionError(message)


@dataclass(frozen=True)
class Span:
    """Some bytes of a file: where they start in it, and their number."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class Tensor(Span):
    """One tensor in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


Content = list[bytes | Span]  # what a file of the output consists of


@dataclass
class Conversion:
    """The facts about one conversion that are known before its first byte is written."""

    folder: Path  # the source's
    hub_id: str | None  # where known
    commit: str | None
    config: dict[str, Any]  # the source's
    block_size: int = 0
    mask_token_id: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by name, in the order of the data
    to_rewrite: set[Path] = field(default_factory=set)  # files of weights that cannot be copied as they are
    mask_rows: dict[str, bytes] = field(default_factory=dict)  # new rows of the mask token, by tensor
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The source's Hub id where known, else its folder's name."""
        return self.hub_id or Path(os.path.abspath(self.folder)).name

    @property
    def is_bard(self) -> bool:
        """Whether the source is a Bard-VL checkpoint already."""
        return self.config["model_type"] == "bard_vl"

    @property
    def is_seed(self) -> bool:
        """Whether the weights have never been trained for block diffusion."""
        return not self.is_bard or self.config.get("trained") is False

    @property
    def trained_block_size(self) -> int | None:
        """The size that a Bard-VL checkpoint was trained with, by its config, else its name; None if neither says."""
        stated = self.config.get("block_size") if self.is_bard else None
        return named_block_size(self.name) if self.is_bard and stated is None else stated

    @property
    def is_tied(self) -> bool:
        """Whether the output matrix is the embedding; transformers 4 reads the text level, 5 the outer one."""
        tied = self.config["text_config"].get("tie_word_embeddings")
        return bool(self.config.get("tie_word_embeddings") if tied is None else tied)


def convert(
    source: str | Path,
    output: str | Path,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    mask_row: str = "keep",
    revision: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    progress: bool = True,
) -> Path:
    """Convert `source`, a folder or a Hub id, into the new folder `output`, and return its path.

    The arguments are the script's options, which `--help` describes; `progress` shows a bar, notes and a summary.

    Raises:
        ConversionError: a bad argument or source, an existing output, a concurrent conversion to the same output, a
            full or read-only disk, a checksum that differs, a failed upload (only then does `output` exist).
    """
    require(mask_row in MASK_ROWS, f"mask_row must be 'keep' or 'mean', got {mask_row!r}")
    is_target = push_to_hub is None or is_hub_id(push_to_hub)
    require(is_target, f"push_to_hub must be a repository id such as me/Bard-VL-4B, got {push_to_hub!r}")
    output = Path(os.path.abspath(output))
    try:
        with exclusive_folder(output) as partial:
            job = prepare(source, revision, block_size, mask_token_id, mask_row)
            files = plan_shards(job) | other_files(job, push_to_hub or output.name)
            for note in job.notes if progress else ():
                print(f"note: {note}")
            write_and_verify(partial, files, progress)
            os.rename(partial, output)
            sync(output.parent)
    except OSError as error:
        raise ConversionError(f"cannot convert {source} to {output}: {error}") from error
    if progress:
        print(summary(job, output))
    if push_to_hub:
        commit = "Bard-VL: weights, code and settings"
        try:
            HfApi().create_repo(push_to_hub, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=push_to_hub, folder_path=output, commit_message=commit)
        except Exception as error:  # the HTTP client raises types of its own
            raise ConversionError(f"{output} is complete, but its upload to {push_to_hub} failed: {error}") from error
    return output


def prepare(
    source: str | Path, revision: str | None, block_size: int | None, mask_token_id: int | None, mask_row: str
) -> Conversion:
    """Find the source and check all of it, without writing; what is quick to check comes first."""
    job = locate(source, revision)
    check_architecture(job.config)
    check_companions(job.folder)
    job.block_size = choose_block_size(job, block_size)
    tokens = tokenizer_entries(job.folder)
    job.tensors = tensors = read_tensors(job)
    if job.is_tied and HEAD in tensors:
        head = tensors.pop(HEAD)
        is_same = sha256([head]) == sha256([tensors.get(EMBEDDING, head)])
        require(is_same, "lm_head.weight differs from the embedding although config.json ties the two")
        job.to_rewrite.add(head.path)
        job.notes.append("lm_head.weight repeats the tied embeddings, and is left out")
    check_tensors(job)
    job.mask_token_id = choose_mask_token_id(job, mask_token_id, tokens)
    if mask_row == "mean":
        used = tokens.keys() - {job.mask_token_id}
        job.mask_rows = {name: mean_row(tensors[name], used) for name in (EMBEDDING, HEAD) if name in tensors}
    if "thinking" in job.name.lower() or OPENS_THINKING.search(chat_template(job.folder)[0] or ""):
        job.notes.append("a Thinking source: its reasoning is long, give a max_new_tokens above the default of 256")
    return job


# --- The source -------------------------------------------------------------------------------------------------------


def locate(source: str | Path, revision: str | None) -> Conversion:
    """Find the source's folder, downloading it if `source` is a Hub id, with its name, commit and config."""
    folder = Path(source)
    if folder.is_dir():
        require(revision is None, f"revision {revision!r} needs a Hub id as the source, {source} is a folder")
    else:
        folder = download(str(source), revision)
    snapshot, job = folder.resolve(), Conversion(folder, None, None, read_json(folder / "config.json"))
    if snapshot.parent.name == "snapshots" and snapshot.parents[1].name.startswith("models--"):
        job.hub_id, job.commit = snapshot.parents[1].name.removeprefix("models--").replace("--", "/"), snapshot.name
    else:
        owners = (owner for pattern, owner in RELEASES.items() if re.fullmatch(pattern, job.name))
        job.hub_id = next((f"{owner}/{job.name}" for owner in owners), None)
    return job


def is_hub_id(text: str) -> bool:
    """Whether a text can be a Hub repository's id with its owner."""
    with contextlib.suppress(HFValidationError):
        validate_repo_id(text)
        return "/" in text
    return False


def download(repo: str, revision: str | None) -> Path:
    """Fetch a Hub repository into the Hub's cache; its config first, to refuse before gigabytes of weights."""
    require(is_hub_id(repo), f"source {repo!r} is neither a folder nor a Hub id such as Qwen/Qwen3-VL-4B-Instruct")
    small = [*COPIED_FILES, "config.json", "generation_config.json", "processor_config.json", "README.md"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small))
        check_architecture(read_json(folder / "config.json"))
        return Path(snapshot_download(repo, revision=folder.name, allow_patterns=["model*.safetensors*"]))
    except ConversionError:
        raise
    except Exception as error:  # the HTTP client raises types of its own
        raise ConversionError(f"cannot fetch {repo} (revision {revision or 'main'}) from the Hub: {error}") from error


def check_architecture(config: dict[str, Any]) -> None:
    """Refuse by name whatever is no dense, unquantised Qwen3-VL or Bard-VL, and values of odd types."""
    kind, known = config.get("model_type"), "it must be qwen3_vl, of a dense model, or bard_vl"
    require(kind in ("qwen3_vl", "bard_vl"), f"config.json: model_type {kind!r} cannot be converted; {known}")
    for part in ("text_config", "vision_config"):
        require(isinstance(config.get(part), dict), f"config.json has no {part}")
    for level in (config, config["text_config"], config["vision_config"]):
        for key, value in level.items():
            if key in QUANTISATION:
                method = value.get("quant_method") if isinstance(value, dict) else value
                require(value is None, QUANTISED.format(f"config.json: {key} with quant_method {method!r}"))
            elif key in ("rope_scaling", "rope_parameters"):
                require(isinstance(value or {}, dict), f"config.json: {key} is {value!r} instead of an object")
            elif key in ("tie_word_embeddings", "trained"):
                require(isinstance(value, bool | None), f"config.json: {key} is {value!r} instead of true or false")
            elif key.endswith("_token_id"):
                token_ids(value, f"config.json: {key}")


def token_ids(value: Any, name: str) -> list[int]:
    """Ids that a setting states: one, several, or none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    require(value != [] and all(type(i) is int and i >= 0 for i in ids), f"{name} is {value!r} instead of a token id")
    return ids


def check_companions(folder: Path) -> None:
    """Refuse a source, or a script on its own, that lacks the files without which the output would not load."""
    for names in (("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json")):
        advice = f"{folder} has no {' or '.join(names)}: put the base model's files beside its weights"
        require(any((folder / name).is_file() for name in names), advice)
    for name in COPIED_FILES:
        if name.endswith(".json"):
            read_json(folder / name, {})
    code = CODE_FOLDER / "configuration_bard_vl.py"
    require(code.is_file(), f"{code.name} is missing beside the converter: run it from a full checkout")


def named_block_size(name: str) -> int | None:
    """The block size in a checkpoint's name; None if it has none."""
    named = re.search(r"Bard-VL-B(\d{1,9})", name, re.IGNORECASE)
    return int(named[1]) if named else None


def choose_block_size(job: Conversion, asked: int | None) -> int:
    """Take the block size from the argument, the source's config, its name, or the default, in this order."""
    trained = job.trained_block_size if job.is_bard else DEFAULT_BLOCK_SIZE
    chosen: Any = trained if asked is None else asked
    require(chosen is not None, f"{job.name} does not say its block size: pass block_size, as it was trained with")
    require(type(chosen) is int and chosen > 0, f"block_size must be a positive integer, got {chosen!r}")
    if job.is_bard and trained not in (None, chosen):
        job.notes.append(f"block size {chosen} as asked, although the source was trained with {trained}")
    return chosen


def choose_mask_token_id(job: Conversion, asked: int | None, tokens: dict[int, str]) -> int:
    """Take the mask id from the argument, the source's config, or the default; it must be a free embedding row."""
    candidates = (asked, job.config.get("mask_token_id"), DEFAULT_MASK_TOKEN_ID)
    chosen: Any = next(each for each in candidates if each is not None)
    last = job.tensors[EMBEDDING].shape[0] - 1
    is_row = type(chosen) is int and 0 <= chosen <= last
    require(is_row, f"mask_token_id must lie in the vocabulary, 0 to {last}, got {chosen!r}")
    used = dict(tokens)
    for key, value in (*job.config.items(), *job.config["text_config"].items()):
        if key.endswith("_token_id") and key != "mask_token_id":
            used |= dict.fromkeys(token_ids(value, key), f"the {key} of the source")
    free = (f"{i} is free" for i in (DEFAULT_MASK_TOKEN_ID, *range(last + 1)) if i <= last and i not in used)
    require(chosen not in used, f"mask_token_id {chosen} is {used.get(chosen)}; {next(free, 'no id is free')}")
    return chosen


def tokenizer_entries(folder: Path) -> dict[int, str]:
    """The token of each id of the tokenizer, from every file that may define some; a mask of its own is left out."""
    names = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json")
    whole, words, more, settings = (read_json(folder / name, {}) for name in names)
    mask, is_word, is_added = settings.get("mask_token"), "a word of the tokenizer", "a token added to the tokenizer"
    try:
        mask = mask["content"] if isinstance(mask, dict) else mask
        words = whole["model"]["vocab"] if (folder / names[0]).is_file() else words
        entries = [(i, is_word, word) for word, i in words.items()]
        entries += [(token["id"], is_added, token["content"]) for token in whole.get("added_tokens") or []]
        entries += [(i, is_added, token) for token, i in more.items()]
        decoder = settings.get("added_tokens_decoder") or {}
        entries += [(int(i), is_added, token["content"]) for i, token in decoder.items()]
        for i, _, token in entries:
            token_ids(i, f"the id of {token!r}")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ConversionError(f"the tokenizer in {folder} has no vocabulary of ids: {error!r}") from error
    return {i: f"{what} ({token!r})" for i, what, token in entries if token != mask}


# --- Weights ----------------------------------------------------------------------------------------------------------


def read_tensors(job: Conversion) -> dict[str, Tensor]:
    """Read the headers of all files of weights, in the order of the data, and check them against the index."""
    single, index = job.folder / "model.safetensors", job.folder / "model.safetensors.index.json"
    is_single, is_sharded, names = single.is_file(), index.is_file(), (single.name, index.name)
    require(is_single or is_sharded, f"{job.folder} has neither {' nor '.join(names)}; other formats are not read")
    require(not (is_single and is_sharded), f"{job.folder} has both {' and '.join(names)}: remove the stale one")
    if is_single:
        return {tensor.name: tensor for tensor in read_header(single, job.to_rewrite)}
    weight_map: Any = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(Path(str(file)).name == file for file in weight_map.values())
    require(is_map, f"{index} has no weight_map from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        for tensor in read_header(job.folder / file, job.to_rewrite):
            name, first = tensor.name, tensors.setdefault(tensor.name, tensor)
            require(first is tensor, f"duplicate tensor {name}: in {first.path.name} and {file}")
    for name in [*weight_map, *tensors]:
        stated = weight_map.get(name)
        require(name in tensors, f"{index.name} places {name} in {stated}, which has no such tensor")
        file = tensors[name].path.name
        require(stated == file, f"{name} is in {file}, but {index.name} says {stated}")
    return tensors


def read_header(path: Path, to_rewrite: set[Path]) -> list[Tensor]:
    """Tensors of a safetensors file in the order of their data.

    The library refuses what is cut, absurd or no JSON, and data with gaps or overlaps. Files that their metadata gives
    to another framework than torch, and that transformers would not load, are noted in `to_rewrite`.
    """
    require(path.is_file(), f"{path} is missing")
    start = path.stat().st_size
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata, parts = opened.metadata(), {name: opened.get_slice(name) for name in opened.offset_keys()}
            entries = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()]
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ConversionError(f"{path} is truncated or no safetensors file: {start} bytes, {reason}") from error
    if metadata is not None and metadata.get("format") != "pt":
        to_rewrite.add(path)
    tensors: list[Tensor] = []
    for name, dtype, shape in reversed(entries):  # the last one ends where the file does
        is_plain = not dtype.startswith("F8") and not name.endswith(("weight_scale_inv", "weight_scale"))
        require(is_plain, QUANTISED.format(f"{name} in {path.name} has dtype {dtype}"))
        require(dtype in DTYPE_SIZES, f"{path}: {name} has the unknown dtype {dtype!r}, not one of {[*DTYPE_SIZES]}")
        size = math.prod(shape) * DTYPE_SIZES[dtype]
        start -= size
        tensors.append(Tensor(path, start, size, name, dtype, shape))
    return tensors[::-1]


def check_tensors(job: Conversion) -> None:
    """Compare names and shapes with those of the model of the output's config, as the output's code builds it."""
    tensors = job.tensors
    for part, key in (("text_config", "num_hidden_layers"), ("vision_config", "depth")):
        count = job.config[part].get(key)
        is_built = not isinstance(count, int) or count <= len(tensors)  # more might take for ever
        require(is_built, f"config.json: {key} is {count}, but there are {len(tensors)} tensors in all")
    package = __package__ or "bard_vl_code"
    if package not in sys.modules:  # run as a script, which is in no package; the code files import each other in one
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(CODE_FOLDER)]
    try:
        code = importlib.import_module(f"{package}.modeling_bard_vl")
        config = code.BardVLConfig(**json.loads(to_json(bard_config(job))))
        with code.torch.device("meta"):
            model = code.BardVLForConditionalGeneration(config)
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        longest = config.text_config.max_position_embeddings
    except Exception as error:  # whatever transformers and torch raise at odd values
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConversionError(f"config.json does not describe a model: {reason}") from error
    if job.is_tied:
        shapes.pop(HEAD, None)
    size = job.block_size
    require(size <= longest, f"block_size must be at most the model's {longest} positions, got {size}")
    for what, names in (("lacks", shapes.keys() - tensors.keys()), ("should not have", tensors.keys() - shapes.keys())):
        first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        require(not names, f"by its config.json, the source {what} {len(names)} of its tensors: {first}")
    for name, tensor in tensors.items():
        found, asked = list(tensor.shape), shapes[name]
        require(found == asked, f"{name} has shape {found}, config.json asks for {asked}")


def mean_row(tensor: Tensor, token_ids: set[int]) -> bytes:
    """The mean of the rows `token_ids`, accumulated in float64, in the tensor's dtype."""
    import torch

    num_rows, width = tensor.shape
    is_used = torch.zeros(num_rows, dtype=torch.bool)
    is_used[[token_id for token_id in token_ids if token_id < num_rows]] = True
    total, step = torch.zeros(width, dtype=torch.float64), max(1, CHUNK_SIZE * num_rows // tensor.size)
    with safe_open(tensor.path, framework="pt") as opened:
        weight = opened.get_slice(tensor.name)
        for first in range(0, num_rows, step):
            rows = weight[first : first + step]
            total += rows[is_used[first : first + step]].sum(0, dtype=torch.float64)
    return bytes((total / is_used.sum()).to(rows.dtype).view(torch.uint8).tolist())


def plan_shards(job: Conversion) -> dict[str, Content]:
    """The output's files of weights, one for each of the source's, and their index."""
    by_file: dict[Path, list[Tensor]] = {}
    for tensor in job.tensors.values():
        by_file.setdefault(tensor.path, []).append(tensor)
    files: dict[str, Content] = {}
    count, weight_map = len(by_file), dict[str, str]()
    for number, (path, tensors) in enumerate(by_file.items(), 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        header: bytes | Span = Span(path, 0, tensors[0].start)
        if path in job.to_rewrite:
            header, tensors = new_header(tensors)
        files[name] = [header]
        for tensor in tensors:
            row = job.mask_rows.get(tensor.name, b"")  # in place of the old one
            start = job.mask_token_id * len(row)
            rest = Span(path, tensor.start + start + len(row), tensor.size - start - len(row))
            files[name] += [Span(path, tensor.start, start), row, rest]
        weight_map |= {tensor.name: name for tensor in tensors}
    if count > 1:
        metadata = {"total_size": sum(tensor.size for tensor in job.tensors.values())}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        files["model.safetensors.index.json"] = [to_json(index)]
    return files


def new_header(tensors: list[Tensor]) -> tuple[bytes, list[Tensor]]:
    """Header and order of some tensors in the layout of the safetensors library, which keeps the data aligned."""
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_SIZES[tensor.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, ordered


# --- The output -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive_folder(output: Path) -> Iterator[Path]:
    """Give an empty hidden sibling of `output` to this process alone; what is not renamed by the end is removed."""
    taken = f"{output} exists already: remove it or choose another output"
    require(output.name, taken)  # the root of the file system has none
    new_parents = [parent for parent in output.parents if not parent.exists()]
    lock_path, partial = output.with_name(f".{output.name}.lock"), output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()  # FileLock would call an unwritable folder busy
        try:
            lock = FileLock(lock_path).acquire(timeout=0)
        except Timeout:
            raise ConversionError(f"another conversion is writing {output}") from None
        with lock:
            try:
                require(not os.path.lexists(output), taken)
                if partial.exists():  # a run was killed: its lock is free
                    shutil.rmtree(partial)
                partial.mkdir()
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                with contextlib.suppress(OSError):  # Windows keeps an open file, the library removes it afterwards
                    lock_path.unlink()
    finally:
        with contextlib.suppress(OSError):  # of the first one that is not empty
            for parent in new_parents:
                parent.rmdir()


def write_and_verify(partial: Path, files: dict[str, Content], progress: bool) -> None:
    """Write every file of the output, config.json last, sync, read back and compare."""
    size = sum(len(part) if isinstance(part, bytes) else part.size for parts in files.values() for part in parts)
    free, needed = shutil.disk_usage(partial).free / 1e6, size / 1e6 + 1
    require(free >= needed, f"{partial.parent} has {free:,.0f} MB free, the output needs {needed:,.0f} MB")
    is_disabled = None if progress else True  # None: where standard error is no terminal
    with tqdm(total=2 * size, unit="B", unit_scale=True, desc="copying", disable=is_disabled) as bar:
        digests = {}
        for name, content in files.items():
            with (partial / name).open("wb") as file:
                digests[name] = sha256(content, bar, file.write)
                file.flush()
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):  # out of the page cache, so that verifying reads the disk
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        sync(partial)
        bar.set_description("verifying")
        for name, digest in digests.items():
            found = sha256([Span(partial / name, 0, (partial / name).stat().st_size)], bar)
            require(found == digest, f"verification failed: {name} is not what was written")
    strays = {path.name for path in partial.iterdir()} - digests.keys()
    require(not strays, f"verification failed: unexpected files in {partial}: {', '.join(sorted(strays))}")


def sha256(content: Content, bar: Any = None, write: Callable[[Any], Any] | None = None) -> str:
    """SHA-256 of some bytes, which `write` gets on the way."""
    digest = hashlib.sha256()
    for part in content:
        for chunk in [part] if isinstance(part, bytes) else read_span(part):
            digest.update(chunk)
            if write:
                write(chunk)
            if bar is not None:
                bar.update(len(chunk))
    return digest.hexdigest()


def read_span(span: Span) -> Iterator[bytes]:
    """Yield a span's bytes."""
    with span.path.open("rb") as file:
        file.seek(span.start)
        for start in range(0, span.size, CHUNK_SIZE):
            size = min(CHUNK_SIZE, span.size - start)
            chunk = file.read(size)
            require(len(chunk) == size, f"{span.path} ended while it was read")
            yield chunk


def sync(folder: Path) -> None:
    """Bring a folder's entries to the disk; Windows has no call for that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- The files beside the weights -------------------------------------------------------------------------------------


def other_files(job: Conversion, repo: str) -> dict[str, Content]:
    """The files beside the weights; config.json is last, since loaders take it for the sign of a model."""
    copies = {name: job.folder / name for name in COPIED_FILES}
    # The code's licence is not that of the weights; .gitignore keeps caches and the like out of later uploads.
    copies |= {"LICENSE-CODE": CODE_FOLDER / "LICENSE", ".gitignore": CODE_FOLDER / ".gitignore"}
    copies |= {path.name: path for path in sorted(CODE_FOLDER.glob("*_bard_vl.py"))}
    copies = {name: path for name, path in copies.items() if path.is_file()}
    files: dict[str, Content] = {name: [Span(path, 0, path.stat().st_size)] for name, path in copies.items()}
    template, both_read_it = chat_template(job.folder)
    if template is None:
        job.notes.append("the source has no chat template, so neither has the output")
    elif not both_read_it:
        files["chat_template.jinja"] = [to_utf8(template)]
    processor = read_json(job.folder / "processor_config.json", {})
    if not (job.folder / "preprocessor_config.json").is_file():
        advice = "to serve both, put the base model's into the source"
        job.notes.append(f"the processor files were saved by transformers 5, and 4.57 cannot read them; {advice}")
    processor["processor_class"], processor["mask_token_id"] = "BardVLProcessor", job.mask_token_id
    processor["auto_map"] = {"AutoProcessor": "processing_bard_vl.BardVLProcessor"}
    config, generation = bard_config(job), generation_config(job)
    files["README.md"] = [to_utf8(model_card(job, repo, config | generation))]
    files["processor_config.json"] = [to_json(processor)]
    files["generation_config.json"] = [to_json(generation)]
    files["config.json"] = [to_json(config)]
    return files


def chat_template(folder: Path) -> tuple[str | None, bool]:
    """The source's chat template, and whether its files give it to both the processor and the tokenizer."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8", errors="replace"), True
    files = (folder / "chat_template.json", folder / "tokenizer_config.json")
    # chat_template.jinja is read by both, chat_template.json by the processor alone.
    for_processor, for_tokenizer = (read_json(file, {}).get("chat_template") for file in files)
    template = for_processor or for_tokenizer
    if not isinstance(template, str):
        return None, False
    return template, for_processor is not None and for_tokenizer is not None


def bard_config(job: Conversion) -> dict[str, Any]:
    """The output's config.json: the source's, with Bard-VL's settings and in the spelling that all versions read."""
    levels = (job.config, job.config["text_config"], job.config["vision_config"])
    # 4.57 cannot read a quantisation of null.
    config, text, vision = ({key: each[key] for key in each if key not in QUANTISATION} for each in levels)
    # transformers 5 alone reads `rope_parameters`, both lines read the older pair; without a `rope_theta` they differ
    # in the default, of which Qwen3-VL's is 5,000,000.
    modern = dict(text.pop("rope_parameters", None) or {})
    rope = dict(text.get("rope_scaling") or modern)
    in_rope = rope.pop("rope_theta", modern.get("rope_theta", 5_000_000))
    text["rope_scaling"], text["rope_theta"] = rope, text.get("rope_theta", in_rope)
    text |= {"tie_word_embeddings": job.is_tied, "model_type": "qwen3_vl_text"}
    vision["model_type"] = "qwen3_vl"  # the spelling of 4.57, which 5.x corrects when it loads
    head: dict[str, Any] = {"model_type": "bard_vl", "architectures": ["BardVLForConditionalGeneration"]}
    head["auto_map"] = read_json(CODE_FOLDER / "config.json")["auto_map"]
    head |= {"block_size": job.block_size, "mask_token_id": job.mask_token_id}
    head |= {"trained": False} if job.is_seed else {}
    parts = {"text_config": text, "vision_config": vision, "tie_word_embeddings": job.is_tied}
    return head | {key: value for key, value in config.items() if key not in head} | parts


def generation_config(job: Conversion) -> dict[str, Any]:
    """The output's generation_config.json: the source's token ids, and greedy block decoding, as ours states it.

    Autoregressive sampling settings (temperature, top_p, top_k, penalties) are dropped: they were tuned for another
    decoding loop. A Bard-VL source keeps its threshold: its own, or what its authors recommend for a published name.
    """
    path, own = job.folder / "generation_config.json", read_json(CODE_FOLDER / "generation_config.json")
    source, settings = read_json(path, {}), {key: value for key, value in own.items() if not key.endswith("_token_id")}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = source.get(key, job.config["text_config"].get(key, job.config.get(key)))
        if token_ids(value, f"{path}: {key}"):
            settings[key] = value
    threshold = source.get("confidence_threshold") if job.is_bard else None
    if threshold is not None:
        is_share = type(threshold) in (int, float) and 0 <= threshold <= 1
        require(is_share, f"{path}: confidence_threshold is {threshold!r} instead of a number from 0 to 1")
    elif job.is_bard and job.name.startswith(f"{PUBLISHER}/") and job.block_size in PUBLISHED_THRESHOLDS:
        threshold, where = PUBLISHED_THRESHOLDS[job.block_size], f"at block size {job.block_size}"
        job.notes.append(f"the confidence threshold is {threshold}, as the authors of {job.name} recommend {where}")
    return settings if threshold is None else settings | {"confidence_threshold": threshold}


SEEDED = """\
**These weights are a starting point, not a finished model.** They come from an autoregressive model and have not been
trained for block diffusion: until they are (block size {}), `generate` gives no sensible text."""
TRAINED = """\
The source is a Bard-VL checkpoint; this folder adds code and settings to it. Decode with the block size that it was
trained with, here taken to be {}."""


def model_card(job: Conversion, repo: str, settings: dict[str, Any]) -> str:
    """The output's README.md, model_card.md filled in with `settings`, and the metadata that the Hub reads."""
    readme = job.folder / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    stated = dict(re.findall(r"^(license(?:_name|_link)?):[ \t]*(\S.*)$", front[1] if front else "", re.MULTILINE))
    metadata = {"license": "apache-2.0", **stated}
    if "license" not in stated:
        job.notes.append("the source's card states no licence: the output's says apache-2.0, Qwen3-VL's; check it")
    if job.hub_id:
        metadata |= {"base_model": job.hub_id, "base_model_relation": "finetune"}
    rows = " and ".join(job.mask_rows)
    return Template((CODE_FOLDER / "model_card.md").read_text("utf-8")).substitute(
        settings,
        metadata="\n".join(f"{key}: {value}" for key, value in metadata.items()),
        title=repo.split("/")[-1],
        path=repo,
        source=f"{job.name} at commit `{job.commit}`" if job.commit else job.name,
        edits=f" except the rows of the mask token in {rows}, set to the mean of the vocabulary's rows" if rows else "",
        state=(SEEDED if job.is_seed else TRAINED).format(job.block_size),
        licence=metadata["license"],
    )


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object from a file, which may be missing if there is a default."""
    if default is not None and not path.is_file():
        return default
    require(path.is_file(), f"{path} is missing")
    try:
        result = json.loads(path.read_bytes(), parse_constant=int)  # which refuses Infinity and NaN
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no valid JSON: {error}") from error
    require(isinstance(result, dict), f"{path} holds a {type(result).__name__} instead of a JSON object")
    return result


def to_json(content: dict[str, Any]) -> bytes:
    """JSON as the Hub's repositories have it."""
    return to_utf8(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def to_utf8(text: str) -> bytes:
    """The bytes of a text; half a surrogate pair, which UTF-8 lacks, as its escape."""
    return text.encode("utf-8", "backslashreplace")


def summary(job: Conversion, output: Path) -> str:
    """A report of the conversion, in a few lines."""
    sizes, files = [each.size for each in job.tensors.values()], {each.path for each in job.tensors.values()}
    changed = ", ".join(f"row {job.mask_token_id} of {name}" for name in job.mask_rows) or "none"
    seed = "\n  a seed: until it is trained for block diffusion (docs/training.md) it writes nonsense"
    return (
        f"converted {job.name} to {output}\n"
        f"  {len(sizes)} tensors, {sum(sizes):,} bytes in {len(files)} shard(s), all verified by SHA-256\n"
        f"  block size {job.block_size}, mask token {job.mask_token_id}, changed rows: {changed}"
        f"{seed if job.is_seed else ''}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script, whose options are the arguments of `convert`; returns 0, or 1 after printing an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    mean = "initial value of that row, and of the untied output matrix's: as it is, or the mean over all tokens"
    size = "tokens per block (default: as the config states, else a Bard-VL name, else, for Qwen3-VL, 4)"
    add("--source", required=True, help="dense Qwen3-VL (Instruct or Thinking) or Bard-VL checkpoint: folder or Hub id")
    add("--output", required=True, help="folder to write; must not exist, missing parents are made")
    add("--block-size", type=int, help=size)
    add("--mask-token-id", type=int, help="embedding row of the mask (default: what the config states, else 151671)")
    add("--mask-row", choices=MASK_ROWS, default="keep", help=f"{mean} of the tokenizer but the mask (default: keep)")
    add("--revision", help="branch, tag or commit of a Hub source")
    add("--push-to-hub", metavar="REPO", help="upload the finished folder to this repository")
    add("--private", action="store_true", default=None, help="make a repository created so private")
    add("--quiet", action="store_true", help="no progress bar, notes or summary")
    options = vars(parser.parse_args(argv))
    try:
        convert(progress=not options.pop("quiet"), **options)
    except (ConversionError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        return 1 if isinstance(error, ConversionError) else 130
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of the libraries
    warnings.simplefilter("ignore")
    sys.exit(main())
