"""Steps recorded by CUDA graphs: a whole step, choice and table of slots included, as one launch that reads nothing.

A recording has rows, keys and values at fixed addresses, and a graph for each number of slots. Calls of a shape use it
in turn; a few wait with the model. Any thread may record: the capture is its own.
"""

import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers.utils import logging

from .attention_bard_vl import ATTENTION_NAME, Slots
from .cache_bard_vl import BlockCacheLayer, Buffers, Writing
from .compat_bard_vl import attention_of
from .generation_config_bard_vl import DecodingSettings
from .inputs_bard_vl import Prompt
from .layers_bard_vl import Layers, is_plain
from .processors_bard_vl import TokenProcessors
from .rows_bard_vl import Decision, Denoiser, Rows

logger = logging.get_logger(__name__)

COLUMNS = 256  # recordings have a multiple of this many columns, so that calls of similar lengths share them
DEVICES = {"cuda"}  # that have graphs; elsewhere the same steps would run one launch after another
NUM_WARM_UP_RUNS = 3  # of a step before it is recorded: kernels are compiled, libraries find their algorithms
NUM_IDLE = 2  # recordings that wait for another call; the one that has waited longest goes first
Outcome = tuple[Decision, torch.Tensor]
ALWAYS_TWO = 8  # rows up to which every step has two slots a row: weights rule, and the host need not know who carries


@dataclass
class Kept:
    """The state that is kept for a model as long as it lives."""

    layers: Layers | None = None
    idle: list[tuple[tuple, "Recording"]] = field(default_factory=list)


_kept: weakref.WeakKeyDictionary[torch.nn.Module, Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_recording = threading.Lock()


def layers_of(model: Any, settings: DecodingSettings) -> Layers | None:
    """The compiled layers that decode a model's blocks; None where its modules do.

    That is: where the call asks for it, on a GPU also if it asks for nothing, and nothing about the layers is special.
    """
    text_model, device = model.model.language_model, model.get_input_embeddings().weight.device
    asked = settings.cache_implementation
    if asked == "dynamic" or (asked is None and device.type != "cuda"):
        return None
    if attention_of(model.config.text_config) != ATTENTION_NAME or torch.is_autocast_enabled(device.type):
        return None
    with _lock:
        kept = _kept.setdefault(model, Kept())
        if kept.layers is not None and kept.layers.is_current() and is_plain(text_model):
            return kept.layers
        kept.layers, kept.idle = None, []
        if not is_plain(text_model):
            if asked is not None:
                logger.warning_once(
                    "the text layers are adapted, quantised, hooked or spread over devices: their steps are not "
                    "compiled and run eagerly"
                )
            return None
        kept.layers = Layers(text_model, fuses=device.type == "cuda")
        return kept.layers


@contextmanager
def recording(
    model: Any, layers: Layers, denoiser: Denoiser, shape: tuple[int, int], processors: TokenProcessors | None = None
) -> Iterator["Recording"]:
    """A recording for (rows, columns) that no other call has meanwhile."""
    settings = replace(denoiser.settings, max_new_tokens=0, num_return_sequences=1, prefill_chunk_size=None)
    made_of = processors and processors.made_of
    key = (id(layers), shape, settings, made_of, torch.is_inference_mode_enabled())
    with _lock:
        idle = _kept[model].idle
        places = [place for place, (other, _) in enumerate(idle) if other == key]
        lent = idle.pop(places[-1])[1] if places else None
    if lent is None:
        lent = Recording(model, layers, denoiser, shape, processors)
    try:
        yield lent
    finally:
        with _lock:
            idle = _kept[model].idle
            idle.append((key, lent))
            del idle[:-NUM_IDLE]


def release_idle(model: Any) -> None:
    """Give back the memory of a model's recordings that no call is using."""
    with _lock:
        if model in _kept:
            _kept[model].idle.clear()


class Recording:
    """Rows and buffers at fixed addresses, and the graphs of steps on them.

    Args:
        model: the whole model.
        layers: its compiled layers.
        denoiser: of the settings that a step depends on.
        shape: rows and columns.
        processors: of the settings that name one.
    """

    def __init__(
        self,
        model: Any,
        layers: Layers,
        denoiser: Denoiser,
        shape: tuple[int, int],
        processors: TokenProcessors | None = None,
    ):
        self.embed, self.lm_head, self.processors = model.get_input_embeddings(), model.lm_head, processors
        self.layers, self.denoiser = layers, denoiser
        num_rows, num_columns = shape
        form, weight = layers.form, self.embed.weight
        device = weight.device
        state = weight.new_zeros(num_rows, form.key_heads, num_columns, form.size)
        self.buffers: list[Buffers] = [(torch.zeros_like(state), torch.zeros_like(state)) for _ in layers.layers]
        self.cache_layers = [BlockCacheLayer() for _ in layers.layers]
        for layer, pair in zip(self.cache_layers, self.buffers, strict=True):
            layer.lend(pair)
        self.rows = blank_rows(num_rows, num_columns, denoiser.settings, device)
        self.generator = torch.Generator(device)
        self.steps: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Outcome]] = {}  # by their numbers of slots
        self.status = torch.zeros(2, dtype=torch.long, device=device)
        self.seen = [torch.zeros(2, dtype=torch.long, pin_memory=device.type == "cuda") for _ in range(2)]

    @property
    def num_rows(self) -> int:
        """Rows of a call, the spare one aside."""
        return self.rows.spare

    def step(self, num_main: int, num_extra: int) -> Outcome:
        """One step of `num_main` rows at most, of which `num_extra` at most carry a finished block.

        Slots: the rows' own blocks, the carried ones, then those further on that are denoised together with them. Reads
        and writes at fixed addresses only. Returns the decision on the rows that run, in their order, then on the spare
        one, and the confidence (rows, block) of what was chosen.
        """
        rows, size, device = self.rows, self.denoiser.size, self.status.device
        owner = torch.cat(
            [in_front(~rows.ended[:-1], num_main, rows.spare), in_front(rows.carries[:-1], num_extra, rows.spare)]
        )
        behind = torch.arange(len(owner), device=device) >= num_main
        main, ahead = owner[:num_main], self._blocks_ahead(num_main)
        if ahead is not None:
            further = self._with_room(main, ahead)
            owner, behind = torch.cat([owner, further]), torch.cat([behind.long(), -ahead])
        is_spare = owner == rows.spare
        first = torch.where(is_spare, rows.num_columns - size, rows.start[owner] - size * behind)
        source = owner.clamp(max=rows.spare - 1)
        place = torch.arange(size, device=device)
        column = first[:, None] + place
        begin = torch.arange(len(owner), device=device, dtype=torch.int32) * size
        slots = Slots(
            row=source.int(),
            begin=begin,
            count=torch.full_like(begin, size),
            length=torch.where(is_spare, 1, first + size).int(),
            width=size,
        )
        cell = (owner[:, None].expand_as(column).flatten(), column.flatten())
        written = source[:, None].expand_as(column).flatten()
        writing = Writing(written, cell[1], self.num_rows, rows.num_columns, rows.num_columns)
        for layer in self.cache_layers:
            layer.writing = writing
        embeds, positions = self.embed(rows.ids[cell])[None], rows.positions[:, cell[0], cell[1]][:, None]
        hidden = self.layers.run(embeds, positions, self.cache_layers, slots)[0].unflatten(0, (-1, size))
        if ahead is not None:
            logits = self.lm_head(hidden[num_main + num_extra :])
            self.denoiser.decide_ahead(rows, further, ahead, logits, self.generator)
        logits = self.lm_head(hidden[:num_main])
        choice = self.denoiser.choose(rows, main, logits, self.generator, self.processors)
        decision = self.denoiser.decide(rows, main, choice)
        running = ~rows.ended[:-1]
        self.status.copy_(torch.stack([running.sum(), (running & rows.carries[:-1]).sum()]))
        return decision, choice.confidence

    def _blocks_ahead(self, num_main: int) -> torch.Tensor | None:
        """(m `num_main`,) how far each further slot is from its row's block; None where blocks are denoised alone."""
        several = self.denoiser.settings.concurrent_blocks
        if several == 1:
            return None
        return torch.arange(1, several, device=self.status.device).repeat_interleave(num_main)

    def _with_room(self, main: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
        """The rows `main` again for each of `ahead`, the spare one where the limit leaves no such block."""
        rows, owner = self.rows, main.repeat(len(ahead) // len(main))
        offset = rows.start[owner] - rows.length[owner] + self.denoiser.size * ahead
        return torch.where(offset < rows.limit[owner], owner, rows.spare)

    def start(self, rows: Rows, generator: torch.Generator | None) -> None:
        """Take over the rows of a call, and draw the seed of its samples from its generator, or torch's own."""
        self.rows.copy_from(rows)
        if self.denoiser.settings.samples:
            device = "cpu" if generator is None else generator.device
            seed = torch.randint(2**62, (), generator=generator, device=device).item()
            self.generator.manual_seed(int(seed))

    def next_step(self, num_running: int, num_carrying: int) -> Outcome:
        """A step of the rows that run: the decision on them, and the confidence of what was chosen."""
        decision, confidence = self._replay(*self._slots_for(num_running, num_carrying))
        parts = (getattr(decision, each.name)[:num_running] for each in fields(decision))
        return Decision(*parts), confidence[:num_running]

    def run(self, num_running: int, num_carrying: int) -> Counter[str]:
        """Run steps until all rows have ended. Returns the forwards by kind."""
        states = [(num_running, num_carrying)]
        pending: deque[tuple[Any, torch.Tensor]] = deque()
        is_late = self.num_rows <= ALWAYS_TWO
        number = 0
        while states[-1][0]:
            self._replay(*self._slots_for(*states[-1]))
            pending.append(self._look(self.seen[number % 2]))
            number += 1
            if len(pending) > is_late:
                states.append(_read(*pending.popleft()))
        while pending:
            states.append(_read(*pending.popleft()))
        kinds = ("commit+denoise" if carry else "denoise" if run else "overrun" for run, carry in states[:number])
        return Counter(kinds)

    def _slots_for(self, running: int, carrying: int) -> tuple[int, int]:
        """Numbers of slots, few different ones, that have room for these rows."""
        if self.num_rows <= ALWAYS_TWO:
            return self.num_rows, self.num_rows
        main = self.num_rows
        while main // 2 >= running and main > ALWAYS_TWO:
            main //= 2
        extra = next(n for n in (0, main // 4, main // 2, main) if n >= carrying)
        return main, extra

    def _look(self, seen: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Have the status copied to the host, and an event that tells when it is there."""
        seen.copy_(self.status, non_blocking=True)
        event = None
        if self.status.is_cuda:
            event = torch.cuda.Event()
            event.record()
        return event, seen

    def _replay(self, num_main: int, num_extra: int) -> Outcome:
        if not self.status.is_cuda:
            return self.step(num_main, num_extra)
        if (num_main, num_extra) not in self.steps:
            self.steps[num_main, num_extra] = self._record(num_main, num_extra)
        graph, outcome = self.steps[num_main, num_extra]
        graph.replay()
        return outcome

    def _record(self, num_main: int, num_extra: int) -> tuple[torch.cuda.CUDAGraph, Outcome]:
        """Record a step, while no row runs: its graph, and the tensors that each replay writes."""
        kept = [each.clone() for each in vars(self.rows).values()]
        state = self.generator.get_state()
        self.rows.ended.fill_(True)
        self.rows.carries.fill_(False)
        with _recording:
            torch.cuda.synchronize()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(NUM_WARM_UP_RUNS):
                    self.step(num_main, num_extra)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outcome = self.step(num_main, num_extra)
        self.generator.set_state(state)
        for each, value in zip(vars(self.rows).values(), kept, strict=True):
            each.copy_(value)
        return graph, outcome


def _read(event: Any, seen: torch.Tensor) -> tuple[int, int]:
    if event is not None:
        event.synchronize()
    running, carrying = seen.tolist()
    return running, carrying


def in_front(wanted: torch.Tensor, count: int, spare: int) -> torch.Tensor:
    """(count,) the numbers of rows for which `wanted` (rows,) holds, in order, then the spare one."""
    order = wanted.int().argsort(descending=True, stable=True)[:count]
    return torch.where(wanted[order], order, spare)


def blank_rows(num_rows: int, num_columns: int, settings: DecodingSettings, device: torch.device) -> Rows:
    """Rows of which none runs."""
    empty = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
    ones = torch.ones(num_rows, dtype=torch.long, device=device)
    prompt = Prompt(empty, ones, [1] * num_rows, empty.expand(3, -1, -1), ones, {})
    rows = Rows.lay_out(prompt, [0] * num_rows, settings.block_size, settings.mask_token_id, num_columns)
    rows.ended.fill_(True)
    return rows
