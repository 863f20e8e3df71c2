"""Shared by the converter's test files: the script as a module, source folders, and ways to look into them."""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import tiny
from bard_vl import convert_qwen3vl_to_bard as converter

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "convert_qwen3vl_to_bard.py"


MASK = tiny.IDS["small"].mask_token_id
_session_folder = tempfile.TemporaryDirectory(prefix="bard-vl-convert-")


@cache
def _template(tied: bool, shard_size: str | None, intermediate_size: int, bfloat16: bool) -> Path:
    import torch

    path = Path(_session_folder.name) / f"{tied}-{shard_size}-{intermediate_size}-{bfloat16}"
    return tiny.write_qwen3vl(
        path,
        tie_word_embeddings=tied,
        max_shard_size=shard_size,
        dtype=torch.bfloat16 if bfloat16 else torch.float32,
        text_config={"intermediate_size": intermediate_size},
    )


def write_source(
    path: Path,
    tied: bool = True,
    shard_size: str | None = None,
    intermediate_size: int = 128,
    bfloat16: bool = False,
) -> Path:
    """A Qwen3-VL folder of the test's own, to convert or to damage."""
    return Path(shutil.copytree(_template(tied, shard_size, intermediate_size, bfloat16), path))


def convert(source: Path | str, output: Path, **options: Any) -> Path:
    """The function under test, silent and with the tiny vocabulary's mask id."""
    return converter.convert(source, output, **{"mask_token_id": MASK, "progress": False, **options})


def command(source: Path | str, output: Path, *options: str) -> list[str]:
    """The script's command line with the tiny vocabulary's mask id."""
    line = [sys.executable, str(SCRIPT), "--source", str(source), "--output", str(output), "--mask-token-id", str(MASK)]
    return [*line, *options]


def run_script(source: Path | str, output: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the script to its end."""
    return subprocess.run(command(source, output, *options), capture_output=True, text=True, timeout=120)


def start(
    source: Path | str, output: Path, *options: str, errors: Path = Path(os.devnull), limit: int | None = None
) -> BaseProcess:
    """Start the script's `main` in a process of its own, a fork, which need not import torch first.

    `limit` bounds the bytes of a file that it may write.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_main, args=(command(source, output, *options)[2:], errors, limit)
    )
    process.start()
    return process


def _main(arguments: list[str], errors: Path, limit: int | None) -> None:
    usual, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with errors.open("w") as sys.stderr:  # written when it is closed, without the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or usual, hard))
        code = converter.main(arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (usual, hard))
    sys.exit(code)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, changes: dict[str, Any], level: str | None = None) -> None:
    """Set keys of a JSON object, or of the object under `level`; a value of None removes the key."""
    content = read_json(path)
    target = content if level is None else content[level]
    target.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del target[key]
    path.write_text(json.dumps(content), encoding="utf-8")


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_shard(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """A safetensors file with whatever header it is given."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor in a folder, read by the safetensors library."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        for name, tensor in tensors.items()
    }


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
