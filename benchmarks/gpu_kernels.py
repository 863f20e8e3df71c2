"""The times of single kernels of a step: matrix products, attention by backend, the package's slot kernel."""

import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from gpu_run import BLOCK, Bench, Found
from measuring import copy_bandwidth, median_ms, recorded, seconds_of
from torch.nn import functional as F

KERNEL_SETS = 8  # of keys and values in turn: one alone would stay in the cache of the chip, as no layer's does
SLOT_TENSORS = ("row", "begin", "count", "length")


@torch.no_grad()
def floors(bench: Bench) -> Found:
    """The matrix products of a step, with the weights as they are and with those of one input side by side."""
    layers, shape = bench.model.model.language_model.layers, bench.shape
    fused = []
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        fused.append((qkv, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])))
    for tokens in (16, 32, 128, 512) if bench.on_cuda else (16,):
        x = bench.random(tokens, shape.hidden_size)
        heads = bench.random(tokens, shape.num_attention_heads * shape.head_dim)
        inner = bench.random(tokens, shape.intermediate_size)

        def separate(x: torch.Tensor = x, heads: torch.Tensor = heads, inner: torch.Tensor = inner) -> None:
            for layer in layers:
                attention, mlp = layer.self_attn, layer.mlp
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                    projection(x)
                attention.o_proj(heads)
                mlp.down_proj(inner)
            bench.model.lm_head(x)

        def together(x: torch.Tensor = x, heads: torch.Tensor = heads, inner: torch.Tensor = inner) -> None:
            for layer, (qkv, gate_up) in zip(layers, fused, strict=True):
                F.linear(x, qkv)
                layer.self_attn.o_proj(heads)
                F.linear(x, gate_up)
                layer.mlp.down_proj(inner)
            bench.model.lm_head(x)

        times = {call.__name__: median_ms(recorded(call, bench.device), bench.device) for call in (separate, together)}
        yield f"matrix products, {tokens} tokens", {f"{name}_ms": each for name, each in times.items()}


def attention(bench: Bench) -> Found:
    """One call as a step poses it, by backend: heads that share keys are further queries of one head."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape, length = bench.shape, bench.prompt_length
    heads, size, queries = shape.num_key_value_heads, shape.head_dim, BLOCK * _group(bench)
    columns = length + bench.new_tokens
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION") if bench.on_cuda else ("MATH",)
    cases = {"1 row": (1, length, False), "1 row, mask": (1, columns, True), "32 rows, mask": (32, columns, True)}
    for name in names:
        found: dict[str, Any] = {}
        with sdpa_kernel([getattr(SDPBackend, name)]):
            for case, (rows, keys, masked) in cases.items():
                query = bench.random(rows, heads, queries, size)
                sets = [bench.random(2, rows, heads, keys, size) for _ in range(KERNEL_SETS)]
                seen = torch.arange(keys, device=bench.device) < keys - keys // 12
                mask = seen.expand(rows, 1, queries, keys).contiguous() if masked else None

                def calls(query: torch.Tensor = query, sets: list = sets, mask: torch.Tensor | None = mask) -> None:
                    for key, value in sets:
                        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

                found[f"{case}, ms"] = _or_error(_ms_of_sets, bench, calls)
            found["1 row, first call at a new length, ms"] = [
                _or_error(_first_call_ms, bench, queries, length + 16 * extra + 3, 1, False) for extra in range(6)
            ]
            found["8 rows, mask, first call at a new length, ms"] = [
                _or_error(_first_call_ms, bench, queries, length // 3 + extra, 8, True) for extra in range(4)
            ]
        yield f"attention, {name.lower().removesuffix('_attention')}", found


def _group(bench: Bench) -> int:
    return bench.shape.num_attention_heads // bench.shape.num_key_value_heads


def _ms_of_sets(bench: Bench, calls: Callable[[], None]) -> float:
    return median_ms(recorded(calls, bench.device), bench.device) / KERNEL_SETS


def _or_error(call: Callable[..., float], *arguments: Any) -> float | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each backend says at length why it is not used
            return call(*arguments)
    except Exception as error:  # this backend does not do it
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def _first_call_ms(bench: Bench, queries: int, keys: int, rows: int, masked: bool) -> float:
    heads, size = bench.shape.num_key_value_heads, bench.shape.head_dim
    query, key, value = (bench.random(rows, heads, count, size) for count in (queries, keys, keys))
    mask = torch.ones(rows, 1, queries, keys, dtype=torch.bool, device=bench.device) if masked else None
    return 1000 * seconds_of(lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask), bench.device)


def slot_kernel(bench: Bench) -> Found:
    """The package's kernel: how right it is, and how fast beside reading the keys and values that it needs."""
    if not bench.on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        yield "slot kernel", {"skipped": "needs CUDA, or TRITON_INTERPRET=1"}
        return
    from bard_vl.kernel_bard_vl import attend_slots

    bandwidth = copy_bandwidth(bench.device)
    columns = 2304 if bench.on_cuda else 96
    for num_slots in (1, 2, 8, 32, 40) if bench.on_cuda else (1, 3):
        rows = 1 if num_slots == 2 else min(num_slots, 32)
        slots, query, sets = _slots(bench, num_slots, rows, columns)

        def calls(query: torch.Tensor = query, sets: list = sets, slots: Any = slots) -> None:
            for key, value in sets:
                attend_slots(query, key, value, slots)

        key, value = sets[0]
        error = _error_of(attend_slots(query, key, value, slots), query, key, value, slots)
        times = median_ms(recorded(calls, bench.device), bench.device, 20 if bench.on_cuda else 1) / len(sets)
        longest: dict[int, int] = {}
        for row, length in zip(slots.row.tolist(), slots.length.tolist(), strict=True):
            longest[row] = max(longest.get(row, 0), length)
        column = 2 * bench.shape.num_key_value_heads * bench.shape.head_dim * query.element_size()
        read = column * sum(longest.values()) / bandwidth
        yield f"slot kernel, {num_slots} slots", {"relative_error": error, "ms": times, "read_ms": 1000 * read}


def _slots(bench: Bench, num_slots: int, rows: int, columns: int) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """Slots of one block each, their queries, and keys and values that hold NaN where no slot may look."""
    count = {"device": bench.device, "dtype": torch.int32}
    first = columns // 16 if num_slots > 2 else columns - columns // 12
    length = torch.linspace(first, columns - BLOCK, num_slots).int()
    row = torch.arange(num_slots) % rows
    slots = SimpleNamespace(
        row=row.to(**count),
        begin=(BLOCK * torch.arange(num_slots)).to(**count),
        count=torch.full((num_slots,), BLOCK, **count),
        length=length.to(**count),
        width=BLOCK,
    )
    seen = torch.stack([length[row == each].max() for each in range(rows)]).to(bench.device)
    unseen = torch.arange(columns, device=bench.device) >= seen[:, None]
    heads, size = bench.shape.num_key_value_heads, bench.shape.head_dim
    sets = [bench.random(2, rows, heads, columns, size) for _ in range(KERNEL_SETS if bench.on_cuda else 1)]
    for each in sets:
        each.masked_fill_(unseen[None, :, None, :, None], float("nan"))
    return slots, bench.random(num_slots * BLOCK, bench.shape.num_attention_heads, size), sets


def _error_of(found: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: Any) -> float:
    """|found - expected| / |expected| over all slots, expected in float64."""
    expected = torch.empty_like(found, dtype=torch.float64)
    for row, begin, count, length in zip(*(getattr(slots, name).tolist() for name in SLOT_TENSORS), strict=True):
        own = slice(begin, begin + count)
        group = query.shape[1] // key.shape[1]
        keys, values = (states[row, :, :length].double().repeat_interleave(group, dim=0) for states in (key, value))
        scores = query[own].double().transpose(0, 1) @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
        expected[own] = (scores.softmax(-1) @ values).transpose(0, 1)
    return ((found.double() - expected).norm() / expected.norm()).item()
