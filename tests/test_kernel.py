"""The kernel of slots, interpreted on a CPU, and compiled for Hopper without a spill, where Triton is installed."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.process

INTERPRETED = """
import torch
from bard_vl import kernel_bard_vl
from bard_vl.attention_bard_vl import Slots, attend_slots
torch.manual_seed(0)
for dtype, counts, heads, key_heads, size, programs in (
    (torch.float32, [4, 4, 3, 4], 4, 2, 16, 264),
    (torch.float16, [16, 16, 5], 8, 2, 64, 64),
    (torch.float32, [32, 32], 8, 2, 80, 1),  # two tiles of queries, a head size that is no power of two, one split
):
    kernel_bard_vl.PROGRAMS = programs
    keys, values = (torch.randn(3, key_heads, 160, size).to(dtype) for _ in range(2))
    keys[:, :, -5:] = float("nan")  # nobody may look there
    rows, lengths = [0, 0, 2, 1][: len(counts)], [120, 136, 17, 155][: len(counts)]
    slots = Slots.of(rows, counts, lengths, torch.device("cpu"))
    queries = torch.randn(sum(counts), heads, size).to(dtype)
    found = kernel_bard_vl.attend_slots(queries, keys, values, slots).double()
    expected = attend_slots(queries.double(), keys.double(), values.double(), slots)
    print(((found - expected).norm() / expected.norm()).item() < (1e-6 if dtype == torch.float32 else 1e-3))
"""


@pytest.mark.process
def test_it_gives_what_scaled_dot_product_attention_gives(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = tmp_path / "interpreted.py"
    script.write_text(INTERPRETED)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stdout + done.stderr


@pytest.mark.compiled
@pytest.mark.parametrize(("block", "splits"), [(4, 16), (16, 16), (16, 1), (32, 4)])
def test_it_compiles_for_hopper_without_a_spill(block: int, splits: int) -> None:
    import triton
    from bard_vl import kernel_bard_vl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_bard_vl._attend
    queries = min(max(16, block * 4), kernel_bard_vl.QUERIES)
    constants = {
        **{"GROUP": 4, "SIZE": 128, "PADDED": 128, "TILES": -(-block * 4 // queries), "M": queries},
        **{"N": kernel_bard_vl.KEYS, "SPLITS": splits},
    }
    names = [parameter.name for parameter in kernel.params]
    kinds = {
        **dict.fromkeys(("q", "k", "v", "out"), "*bf16"),
        **dict.fromkeys(("row", "begin", "count", "length"), "*i32"),
        **{"partial": "*fp32", "weight": "*fp32", "scale": "fp32"},
    }
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith(("*", "i32"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 3})
    assembler = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [assembler, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True).stderr
    assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report
    assert "mma" in compiled.asm["ptx"]
