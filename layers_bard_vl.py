"""The text layers' arithmetic over slots as three functions that are compiled once for all layers and lengths.

transformers' modules are the truth; these functions give what they give (tests/test_layers.py), in fewer kernels. They
serve plain layers alone: layers that are adapted, quantised, offloaded or watched by hooks run as their modules say.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, silu
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.utils import logging

from .attention_bard_vl import Slots, attend_slots, with_own_code
from .compat_bard_vl import CheckpointedLayer

logger = logging.get_logger(__name__)
Weights = tuple[torch.Tensor, ...]
_lock = threading.Lock()


def is_plain(text_model: Any) -> bool:
    """Whether nothing has changed the text model: its modules are transformers' own, unhooked and on one device."""
    kinds = {
        stock.Qwen3VLTextModel, stock.Qwen3VLTextDecoderLayer, CheckpointedLayer, stock.Qwen3VLTextAttention,
        stock.Qwen3VLTextMLP, stock.Qwen3VLTextRMSNorm, stock.Qwen3VLTextRotaryEmbedding,
        torch.nn.Linear, torch.nn.Embedding, torch.nn.ModuleList,
    }  # fmt: skip
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    for module in text_model.modules():
        is_activation = not list(module.parameters(recurse=False)) and not list(module.children())
        if type(module) not in kinds and not is_activation:
            return False
        if any(getattr(module, name) for name in hooks) or "forward" in vars(module):
            return False
    weights = list(text_model.parameters())
    return (
        not text_model.training
        and text_model.config.hidden_act == "silu"
        and not text_model.config.attention_bias
        and len({weight.device for weight in weights}) == 1
        and all(type(weight) is torch.nn.Parameter and weight.is_floating_point() for weight in weights)
    )


@dataclass(frozen=True)
class Form:
    """The settings of all layers.

    Attributes:
        heads, key_heads, size: of attention.
        eps: of the norms.
    """

    heads: int
    key_heads: int
    size: int
    eps: float


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; those of several projections of one input may be one matrix.

    Attributes:
        norms: before attention, of queries, of keys, before the MLP.
        inputs: of queries, keys and values; `output` of attention.
        gates: gate and up; `down`.
    """

    norms: Weights
    inputs: Weights
    output: torch.Tensor
    gates: Weights
    down: torch.Tensor


def norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Qwen3-VL's root mean square norm of the last axis, in float32."""
    wide = states.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (tokens, heads, size)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def project(states: torch.Tensor, weights: Weights, sizes: list[int]) -> Weights:
    """Products with matrices of a given number of rows, which may be laid together."""
    if len(weights) == 1:
        return linear(states, weights[0]).split(sizes, dim=-1)
    return tuple(linear(states, weight) for weight in weights)


def begin(
    form: Form, norms: Weights, inputs: Weights, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Weights:
    """Queries, keys and values (tokens, heads, size) of a layer's input (tokens, hidden)."""
    sizes = [form.heads * form.size, form.key_heads * form.size, form.key_heads * form.size]
    parts = project(norm(states, norms[0], form.eps), inputs, sizes)
    query, key, value = (part.unflatten(-1, (-1, form.size)) for part in parts)
    query, key = (norm(part, weight, form.eps) for part, weight in zip((query, key), norms[1:3], strict=True))
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def end(form: Form, layer: Layer, attended: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """A layer's output, of its input (tokens, hidden) and what attention found (tokens, heads, size)."""
    states = states + linear(attended.flatten(1), layer.output)
    inner = layer.gates[0].shape[0] // (2 if len(layer.gates) == 1 else 1)
    gate, up = project(norm(states, layer.norms[3], form.eps), layer.gates, [inner, inner])
    return states + linear(silu(gate) * up, layer.down)


def between(
    form: Form, layer: Layer, norms: Weights, inputs: Weights, attended: torch.Tensor, states: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor,
) -> Weights:  # fmt: skip
    """The end of a layer and the beginning of the next: its input, queries, keys and values."""
    states = end(form, layer, attended, states)
    return states, *begin(form, norms, inputs, states, cos, sin)


def leave(form: Form, layer: Layer, weight: torch.Tensor, attended: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The end of the last layer, and the norm behind it."""
    return norm(end(form, layer, attended, states), weight, form.eps)


class Layers:
    """A plain text model's layers over slots.

    Args:
        text_model: of which `is_plain` holds.
        fuses: whether weights that multiply one input are laid together. Their modules keep them, as views.
    """

    def __init__(self, text_model: Any, fuses: bool):
        config, first = text_model.config, text_model.layers[0]
        self.form = Form(
            config.num_attention_heads, config.num_key_value_heads, first.self_attn.head_dim,
            first.input_layernorm.variance_epsilon,
        )  # fmt: skip
        self.text_model, self.fuses = text_model, fuses
        self.functions = [compiled(function) for function in (begin, between, leave)]
        self.layers = [self._read(layer) for layer in text_model.layers]
        self.addresses = self._addresses()

    def is_current(self) -> bool:
        """Whether the model's weights are still where they were read."""
        return self.addresses == self._addresses()

    def _addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self.text_model.parameters()]

    def _read(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        gates = [mlp.gate_proj, mlp.up_proj]
        norms = (layer.input_layernorm, attention.q_norm, attention.k_norm, layer.post_attention_layernorm)
        take = fused if self.fuses else separate
        return Layer(
            tuple(each.weight.data for each in norms),
            take(inputs), attention.o_proj.weight.data, take(gates), mlp.down_proj.weight.data,
        )  # fmt: skip

    def run(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        cache_layers: list[Any],
        slots: Slots,
    ) -> torch.Tensor:
        """Hidden states (1, tokens, hidden) after the last norm; keys and values go where the cache directs them.

        Args:
            embeds: (1, tokens, hidden).
            positions: (3, 1, tokens).
            cache_layers: of the cache, with their `writing` set.
            slots: see attention_bard_vl.
        """
        cos, sin = (part[0, :, None] for part in self.text_model.rotary_emb(embeds, positions))
        start, go_on, finish = self.functions
        states, (first, *others) = embeds[0], self.layers
        query, key, value = start(self.form, first.norms, first.inputs, states, cos, sin)
        for number, layer in enumerate(self.layers):
            keys, values = cache_layers[number].update(key.transpose(0, 1)[None], value.transpose(0, 1)[None])
            attended = attend_slots(query, keys, values, slots)
            if number < len(others):
                after = others[number]
                states, query, key, value = go_on(
                    self.form, layer, after.norms, after.inputs, attended, states, cos, sin
                )
        return finish(self.form, self.layers[-1], self.text_model.norm.weight.data, attended, states)[None]


def fused(modules: list[torch.nn.Linear]) -> Weights:
    """The modules' weights in one matrix, of which each module then has a view; no more memory, once it is made."""
    with _lock:
        begins = [0]
        for module in modules:
            begins.append(begins[-1] + len(module.weight))
        whole = torch.cat([module.weight.data for module in modules])
        for module, first, last in zip(modules, begins, begins[1:], strict=False):
            module.weight.data = whole[first:last]
        return (whole,)


def separate(modules: list[torch.nn.Linear]) -> Weights:
    """The modules' weights as they are."""
    return tuple(module.weight.data for module in modules)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for tokens of any number; itself, after one warning, where it cannot be compiled."""
    chosen = torch.compile(with_own_code(function), fullgraph=True)  # the second number of tokens makes it general
    is_tried = False

    def run(*args: Any) -> Any:
        nonlocal chosen, is_tried
        if is_tried:
            return chosen(*args)
        try:
            with _lock:
                found = chosen(*args)
                is_tried = True
                return found
        except torch.OutOfMemoryError:  # says nothing about the compiler
            raise
        except Exception as error:  # the compiler may raise anything; a fault of the function is raised again below
            logger.warning_once(f"cannot compile the text layers, they run eagerly: {type(error).__name__}: {error}")
            chosen, is_tried = function, True
            return function(*args)

    return run
