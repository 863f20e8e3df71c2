"""Weights in fewer bits: what `--quantize` loads them with, and the bytes that they take."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, NotASafetensorsRepoError

from .errors import UsageError

KEPT = (
    "lm_head",
    "model.visual",
)  # in the checkpoint's dtype: a small part of the weights, and the first to lose by it
NEEDS = {"int8": ("torchao", "accelerate"), "nf4": ("bitsandbytes", "accelerate")}
# The packages by which transformers loads weights that were saved in fewer bits.
STORED_NEEDS = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "torchao": ("torchao", "accelerate"),
    "compressed-tensors": ("compressed_tensors", "accelerate"),
}
UNPACKED = {"compressed-tensors"}  # packed in files only: in memory they take as much as plain weights
GROUP, GROUPS = 64, 256  # weights that share a scale in nf4, and such scales that share one in turn


def check_quantization(kind: str | None) -> None:
    """Raise `UsageError` unless `kind` is None or one that is known and installed."""
    if kind is None:
        return
    if kind not in NEEDS:
        raise UsageError(f"--quantize must be {' or '.join(NEEDS)}, got {kind}")
    missing = [name for name in NEEDS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'--quantize {kind} needs {", ".join(missing)}: pip install "bard-vl[quantize]"')


def check_stored(name: str, config: Any) -> None:
    """Raise `UsageError` if the weights of a checkpoint are quantised, and a package that reads them is missing."""
    method = stored_method(config)
    missing = [package for package in STORED_NEEDS.get(method, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"{name} has {method.upper()} weights: pip install {' '.join(missing)}")


def stored_method(config: Any) -> str:
    """The method that a checkpoint's weights were quantised by, such as `gptq`; empty for plain weights."""
    stated = getattr(config, "quantization_config", None)
    stated = stated if isinstance(stated, dict) or stated is None else stated.to_dict()
    return str((stated or {}).get("quant_method", ""))


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """The `quantization_config` of `from_pretrained`: linear layers of the language model alone."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[*KEPT])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*KEPT],
    )


def quantized_bytes(model: Any, kind: str) -> int:
    """Bytes of the layers that `kind` quantises, once they are quantised."""
    total = 0
    for module in linear_layers(model):
        count, rows = module.weight.numel(), module.weight.shape[0]
        if kind == "int8":  # a scale per row
            total += count + rows * module.weight.element_size()
        else:  # two weights per byte, a byte per group, a scale per group of groups
            groups = -(-count // GROUP)
            total += -(-count // 2) + groups + 4 * -(-groups // GROUPS)
    return total


def saved_bytes(model: Any, kind: str) -> int:
    """Bytes of weights that quantising saves.

    Args:
        model: a Bard-VL model; one on the meta device does.
        kind: `int8` or `nf4`.
    """
    plain = sum(module.weight.numel() * module.weight.element_size() for module in linear_layers(model))
    return plain - quantized_bytes(model, kind)


def linear_layers(model: Any) -> list[Any]:
    """The layers that are quantised."""
    named = model.named_modules()
    layers = [(name, module) for name, module in named if isinstance(module, torch.nn.Linear)]
    return [module for name, module in layers if not name.startswith(KEPT)]


def bytes_of(tensor: Any) -> int:
    """Bytes that a parameter takes, packed and with its scales."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao
        names, _ = tensor.__tensor_flatten__()
        return sum(bytes_of(getattr(tensor, name)) for name in names)
    size, state = tensor.numel() * tensor.element_size(), getattr(tensor, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):  # bitsandbytes
        size += 0 if part is None else part.absmax.numel() * part.absmax.element_size()
    return size


def stored_bytes(name: str, revision: str | None = None) -> int | None:
    """Bytes of the tensors in a checkpoint's files, by their headers; None if these cannot be had."""
    try:
        found = name if Path(name).is_dir() else snapshot_download(name, revision=revision, local_files_only=True)
        files = sorted(Path(found).glob("*.safetensors"))
        if files:
            return sum(map(data_bytes, files))
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    try:
        files_on_hub = get_safetensors_metadata(name, revision=revision).files_metadata.values()
    except (HfHubHTTPError, NotASafetensorsRepoError, OSError, ValueError):
        return None
    tensors = itertools.chain.from_iterable(file.tensors.values() for file in files_on_hub)
    return sum(end - start for start, end in (tensor.data_offsets for tensor in tensors))


def data_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file; its header alone is read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    spans = (entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    return sum(end - start for start, end in spans)
