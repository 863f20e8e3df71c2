"""Packed rows: who sees whom, the same logits as inference, the same gradients as separate samples (invariant 2)."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from bard_vl import BardVLForConditionalGeneration
from bard_vl.attention_bard_vl import block_attention
from bard_vl.training.packing import (
    BASE,
    CLEAN,
    NOISY,
    PackedRows,
    Sample,
    deal,
    dense_mask,
    fair,
    first_fit_decreasing,
    flex_mask,
    pack,
    packed_length,
    truncate,
)
from golden_models import PROMPTS, last_block_logits
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ragged import IMAGE, MASK, PAD, VIDEO, Row, collate, load
from test_golden import VISUAL, cases_of, tensors_of
from test_golden import load as load_golden
from thorough import cases
from torch.nn.attention.flex_attention import create_mask
from transformers import DynamicCache
from transformers.masking_utils import find_packed_sequence_indices

EOS = 511
BLOCK_SIZES = [1, 2, 3, 4, 8, 16, 32]
Responses = list[tuple[int, int]]


@cache
def double_model() -> BardVLForConditionalGeneration:
    return copy.deepcopy(load()).double()


def index_of(ids: torch.Tensor) -> torch.Tensor:
    """Images before videos, each in order."""
    is_image, is_video = ids == IMAGE, ids == VIDEO
    index = torch.where(is_image, is_image.cumsum(0) - 1, -1)
    return torch.where(is_video, is_image.sum() + is_video.cumsum(0) - 1, index)


def sample_of(row: Row, responses: Responses, sample_id: int = 0) -> Sample:
    inputs = collate([row])
    ids = inputs["input_ids"][0]
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
    return Sample(
        input_ids=ids,
        position_ids=load().get_position_ids(ids[None], **grids)[1:, 0],
        responses=responses,
        visual_index=index_of(ids),
        visual_inputs={name: inputs[name] for name in VISUAL if name in inputs},
        sample_id=sample_id,
    )


def conversation(kind: str, lengths: list[int], sample_id: int = 0) -> tuple[Sample, list[Row]]:
    """A sample whose turns have responses of these lengths, and the prompt of every turn."""
    row, responses, prompts = PROMPTS[kind], [], []
    for turn, length in enumerate(lengths):
        prompts.append(row)
        responses.append((len(row.ids), len(row.ids) + length))
        row = row.add_text(length, seed=50 + turn).add_text(3 + turn, seed=60 + turn)
        row = row.add_image((1, 2, 4), seed=70 + turn, closed=turn % 2 == 0)
    return sample_of(row, responses, sample_id), prompts


def text_sample(responses: Responses, length: int | None = None, sample_id: int = 0) -> Sample:
    """Text alone; token and position are the place."""
    places = torch.arange(responses[-1][1] if length is None else length)
    return Sample(places, places.expand(3, -1), responses, torch.full_like(places, -1), {}, sample_id)


def pack_tightly(samples: list[Sample], block_size: int, pad_to_multiple_of: int = 1) -> PackedRows:
    """Several rows, one of them with several samples."""
    lengths = [packed_length(sample.responses, len(sample.input_ids), block_size) for sample in samples]
    rows = pack(samples, block_size, max(lengths) + min(lengths), PAD, EOS, pad_to_multiple_of)
    assert 1 < len(rows.input_ids) < len(samples)
    return rows


def corrupted(rows: PackedRows, seed: int = 0) -> torch.Tensor:
    """The ids with noisy tokens masked, replaced or kept, a third each."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.rand(rows.input_ids.shape, generator=generator)
    replaced = torch.randint(0, 500, rows.input_ids.shape, generator=generator)
    ids = torch.where(rows.noisy & (choice < 2 / 3), replaced, rows.input_ids)
    return ids.masked_fill(rows.noisy & (choice < 1 / 3), MASK)


def inputs_of(rows: PackedRows, block_size: int | None = None, seed: int = 0, flex: bool = False) -> dict[str, Any]:
    layout = rows.layout(block_size)
    return {
        "input_ids": corrupted(rows, seed),
        "attention_mask": flex_mask(layout) if flex else dense_mask(layout)[:, None],
        "position_ids": rows.position_ids,
        "visual_index": rows.visual_index,
        **rows.visual_inputs,
    }


def noisy_columns(rows: PackedRows, number: int, turn: int) -> tuple[int, torch.Tensor]:
    """The row of a sample's turn, and the columns of its noisy copy."""
    found = ((rows.sample == number) & (rows.turn == turn) & rows.noisy).nonzero()
    assert len(found[:, 0].unique()) == 1
    return int(found[0, 0]), found[:, 1]


# --- who sees whom ---------------------------------------------------------------------------------------------------

Token = tuple[str, int, int]  # kind, turn, place
NOISY_KINDS = ("noisy", "noisy again")


def tokens_of(responses: Responses, block_size: int, noisy_copies: int = 1) -> list[Token]:
    """The columns of a sample, by the text of the rules."""
    last = responses[-1][0]
    tokens: list[Token] = [("base", 0, place) for place in range(last - last % block_size)]
    for turn, (start, end) in enumerate(responses, start=1):
        padded = range(start, start + math.ceil((end - start) / block_size) * block_size)
        tokens += [("tail", turn, place) for place in range(start - start % block_size, start)]
        tokens += [("clean", turn, place) for place in padded]
        tokens += [(kind, turn, place) for kind in NOISY_KINDS[:noisy_copies] for place in padded]
    return tokens


def sees(query: Token, key: Token, responses: Responses, block_size: int) -> bool:
    """One entry of the mask, rule by rule."""
    (kind, turn, place), (key_kind, key_turn, key_place) = query, key
    if kind == "base":
        return key_kind == "base" and key_place // block_size <= place // block_size
    start = responses[turn - 1][0]
    if key_kind == "base":
        return key_place < start // block_size * block_size
    if key_turn != turn:
        return False
    if key_kind == "tail":
        return True
    block, key_block = (place - start) // block_size, (key_place - start) // block_size
    if kind == "clean":
        return key_kind == "clean" and key_block <= block
    if kind in NOISY_KINDS:
        return key_block < block if key_kind == "clean" else key_kind == kind and key_block == block
    return False


@st.composite
def turns(draw: st.DrawFn, max_turns: int = 4) -> Responses:
    end, responses = 0, []
    for _ in range(draw(st.integers(1, max_turns))):
        start = end + draw(st.integers(0 if end else 1, 12))
        end = start + draw(st.integers(1, 12))
        responses.append((start, end))
    return responses


COPIES = st.integers(1, 2)


@given(st.lists(turns(), min_size=1, max_size=4), st.sampled_from([1, 2, 3, 4, 5, 8, 16]), st.integers(0, 60), COPIES)
@hypothesis_settings(max_examples=cases(40))
def test_mask_is_the_rules_read_one_by_one(batch: list[Responses], block_size: int, room: int, copies: int) -> None:
    samples = [text_sample(responses, responses[-1][1] + 2) for responses in batch]
    longest = max(packed_length(responses, responses[-1][1], block_size, copies) for responses in batch)
    rows = pack(samples, block_size, longest + room, PAD, EOS, noisy_copies=copies)
    mask = dense_mask(rows.layout())
    for row in range(len(mask)):
        columns: list[tuple[int, Token] | None] = []
        for number in rows.sample[row].unique_consecutive().tolist():
            columns += (
                [(number, token) for token in tokens_of(batch[number], block_size, copies)] if number >= 0 else []
            )
        columns += [None] * (mask.shape[1] - len(columns))
        expected = [
            [
                column == other
                if query is None or key is None
                else query[0] == key[0] and sees(query[1], key[1], batch[query[0]], block_size)
                for other, key in enumerate(columns)
            ]
            for column, query in enumerate(columns)
        ]
        assert torch.equal(mask[row], torch.tensor(expected))


@given(st.lists(turns(), min_size=1, max_size=4), st.sampled_from([(4, 4), (8, 4), (8, 2), (6, 3), (16, 1)]), COPIES)
@hypothesis_settings(max_examples=cases(12))
def test_block_mask_is_the_dense_mask(batch: list[Responses], sizes: tuple[int, int], copies: int) -> None:
    samples, tile = [text_sample(responses) for responses in batch], 16
    rows = pack(samples, sizes[0], 300, PAD, EOS, noisy_copies=copies)
    layout = rows.layout(sizes[1])
    dense, block_mask = dense_mask(layout), flex_mask(layout, tile)
    count, length = rows.input_ids.shape
    assert tuple(block_mask.shape) == (count, 1, length, length)
    by_element = create_mask(block_mask.mask_mod, count, 1, length, length, device="cpu")
    assert torch.equal(by_element[:, 0], dense)
    padded = torch.nn.functional.pad(dense, [0, -length % tile, 0, -length % tile])
    tiles = padded.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))
    assert torch.equal(block_mask.to_dense()[:, 0].bool(), tiles.any(4).any(2))
    skipped = torch.zeros_like(tiles.any(4).any(2))  # tiles in which the kernel asks no longer
    for row, numbers in enumerate(block_mask.full_kv_num_blocks[:, 0]):
        for query, number in enumerate(numbers):
            skipped[row, query, block_mask.full_kv_indices[row, 0, query, :number].long()] = True
    assert tiles.all(4).all(2)[skipped].all()


@given(
    st.lists(turns(), min_size=1, max_size=3),
    st.sampled_from([(4, 4), (8, 4), (8, 2), (6, 3), (16, 1)]),
    st.integers(),
    COPIES,
)
@hypothesis_settings(max_examples=cases(20))
def test_fair_positions_are_read_off_both_masks(
    batch: list[Responses], sizes: tuple[int, int], seed: int, copies: int
) -> None:
    """The teacher sees all that the student sees, noisy or clean; checked key by key."""
    rows = pack([text_sample(responses) for responses in batch], sizes[0], 300, PAD, EOS, noisy_copies=copies)
    shown = torch.rand(rows.noisy.shape, generator=torch.Generator().manual_seed(seed % 2**32)) < 0.3
    shown &= rows.noisy
    student, teacher, causal = (dense_mask(rows.layout(size)) for size in (*sizes, 1))
    for sees_own, size in ((True, sizes[1]), (False, 1)):
        expected = torch.zeros_like(shown)
        for row, query in rows.noisy.nonzero().tolist():
            own = query if sees_own else int(rows.previous[row, query])
            seen = (teacher if sees_own else causal)[row, own]
            keys = student[row, query].nonzero()[:, 0].tolist()
            of_base = [key for key in keys if not rows.noisy[row, key]]
            assert seen[of_base].all()
            noisy = [key for key in keys if shown[row, key]]
            expected[row, query] = all(seen[key] or seen[rows.twin[row, key]] for key in noisy)
        found = fair(rows.layout(), rows.layout(size), shown, sees_own)
        assert torch.equal(found, expected)


# --- what is where ---------------------------------------------------------------------------------------------------


@given(
    st.lists(turns(), min_size=1, max_size=6),
    st.sampled_from([1, 3, 4, 8]),
    st.integers(0, 99),
    st.integers(1, 32),
    COPIES,
)
@hypothesis_settings(max_examples=cases(30))
def test_every_column_is_what_it_says(
    batch: list[Responses], block_size: int, room: int, multiple: int, copies: int
) -> None:
    samples = [text_sample(responses, responses[-1][1] + 3, 100 + n) for n, responses in enumerate(batch)]
    lengths = [packed_length(responses, responses[-1][1], block_size, copies) for responses in batch]
    rows = pack(samples, block_size, max(lengths) + room, PAD, EOS, multiple, copies)
    assert rows.sample_ids.tolist() == [100 + number for number in range(len(batch))]
    assert rows.input_ids.shape[1] % multiple == 0
    kinds = {BASE: ("base",), CLEAN: ("tail", "clean"), NOISY: NOISY_KINDS}
    seen = []
    for row in range(len(rows.sample)):
        real = rows.sample[row] >= 0
        assert int(real.sum()) <= max(lengths) + room
        assert torch.equal(rows.position_ids[0, row], torch.arange(rows.input_ids.shape[1]))
        assert (rows.input_ids[row, ~real] == PAD).all()
        assert not (rows.noisy[row, ~real] | rows.is_response_padding[row, ~real]).any()
        for number in rows.sample[row, real].unique_consecutive().tolist():
            seen.append(number)
            columns = (rows.sample[row] == number).nonzero()[:, 0]
            tokens = tokens_of(batch[number], block_size, copies)
            assert columns.tolist() == list(range(int(columns[0]), int(columns[0]) + len(tokens)))
            for column, (kind, turn, place) in zip(columns.tolist(), tokens, strict=True):
                start, end = batch[number][turn - 1] if turn else (0, place + 1)
                at = {name: getattr(rows, name)[row, column].item() for name in ("turn", "place", "origin", "stream")}
                assert (at["turn"], at["place"], at["origin"]) == (turn, place, start)
                assert kind in kinds[at["stream"]]
                assert rows.view[row, column] == (kind == "noisy again")
                assert rows.is_response_padding[row, column].item() is (place >= end)
                assert rows.input_ids[row, column] == (place if place < end else EOS)
                assert rows.position_ids[1:, row, column].tolist() == [place] * 3
                assert rows.anchor[row, column] > place - 1 if kind == "base" else rows.anchor[row, column] <= start
                twin, previous = rows.twin[row, column].item(), rows.previous[row, column].item()
                assert rows.answer[row, column] == copies * number + (kind == "noisy again")
                if kind not in NOISY_KINDS:
                    assert (twin, previous) == (-1, -1)
                    continue
                assert tokens[twin - int(columns[0])] == ("clean", turn, place)
                before_kind, before_turn, before_place = tokens[previous - int(columns[0])]
                assert before_place == place - 1
                assert (before_kind, before_turn) in {("base", 0), ("tail", turn), ("clean", turn)}
                assert rows.input_ids[row, twin] == rows.input_ids[row, column]
    assert sorted(seen) == list(range(len(batch)))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 120))
def test_first_fit_decreasing_loses_nothing(lengths: list[int], max_length: int) -> None:
    rows = first_fit_decreasing(lengths, max_length)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    totals = [sum(lengths[item] for item in row) for row in rows]
    assert max(totals, default=0) <= max_length
    assert sum(2 * total <= max_length for total in totals) <= 1  # two rows half empty would have been one


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120), st.integers(1, 8), st.integers(1, 6))
def test_dealt_rows_are_full_and_side_by_side(
    lengths: list[int], room: int, processes: int, micro_batches: int
) -> None:
    dealt = deal(lengths, room, processes, micro_batches)
    assert [len(shares) for shares in dealt] == [processes] * micro_batches
    assert sorted(number for shares in dealt for share in shares for number in share) == list(range(len(lengths)))
    assert dealt[-1][0] or not lengths, "the last micro-batch is where processes come together"
    totals = [[sum(lengths[number] for number in share) for share in shares] for shares in dealt]
    places = processes * micro_batches
    rows = len(first_fit_decreasing(lengths, room))
    assert max(map(max, totals)) <= room * math.ceil(math.ceil(rows / processes) / micro_batches)
    assert sum(map(any, dealt)) <= max(1, math.ceil(rows / processes))
    if rows <= places:
        assert all(total <= room for shares in totals for total in shares)


def test_dealt_rows_keep_eight_processes_busy() -> None:
    """256 samples of very different lengths in 16 micro-batches each: by number, or as full rows."""
    generator = torch.Generator().manual_seed(0)
    lengths = (200 * (1.2 * torch.randn(256, generator=generator)).exp()).clamp(60, 8192).long().tolist()
    by_number = [[[2 * (8 * step + p), 2 * (8 * step + p) + 1] for p in range(8)] for step in range(16)]
    busy, used = [], []
    for dealt in (by_number, deal(lengths, 8192, 8, 16)):
        totals = [[sum(lengths[number] for number in share) for share in shares] for shares in dealt]
        busy.append(sum(map(sum, totals)) / (8 * sum(map(max, totals))))
        used.append(sum(any(shares) for shares in totals))
    assert busy[0] < 0.5
    assert busy[1] > 0.97
    assert used[0] == 16
    assert used[1] == math.ceil(sum(lengths) / 8192 / 8)


def test_no_samples_give_a_row_of_padding() -> None:
    rows = pack([], 4, 100, PAD, EOS, pad_to_multiple_of=16)
    assert rows.input_ids.tolist() == [[PAD] * 16]
    assert torch.equal(dense_mask(rows.layout()), torch.eye(16, dtype=torch.bool)[None])
    assert len(rows.sample_ids) == 0
    with torch.no_grad():
        assert load()(**inputs_of(rows)).logits.isfinite().all()


def test_rows_move_to_a_device() -> None:
    sample, _ = conversation("image", [3])
    rows = pack([sample], 4, 100, PAD, EOS)
    moved = rows.to("meta")
    assert {x.device.type for x in (*moved.layout(), *moved.visual_inputs.values(), moved.sample_ids)} == {"meta"}
    assert rows.input_ids.device.type == "cpu"
    assert moved.block_size == 4


def test_no_line_of_transformers_takes_a_row_for_packed_sequences() -> None:
    samples = [conversation(kind, [3, 5])[0] for kind in ("text", "image")]
    rows = pack(samples, 4, 400, PAD, EOS)
    assert len(rows.input_ids) == 1
    found = find_packed_sequence_indices(rows.position_ids[0])
    assert found is None or not found.any()
    inputs = inputs_of(rows)
    with torch.no_grad():
        expected = load()(**inputs).logits
        other = torch.cat([rows.place[None], rows.position_ids[1:]])
        assert torch.equal(load()(**{**inputs, "position_ids": other}).logits, expected)


# --- the same logits as inference -------------------------------------------------------------------------------------


def clean_response(rows: PackedRows, number: int, turn: int) -> list[int]:
    row, columns = noisy_columns(rows, number, turn)
    return rows.input_ids[row, rows.twin[row, columns]].tolist()


def cached_block_logits(prompt: Row, positions: torch.Tensor, response: list[int], block_size: int) -> torch.Tensor:
    """Logits of the last block of the response, its prompt and earlier blocks encoded into a cache one by one."""
    model, length, cached = double_model(), len(prompt.ids), DynamicCache()
    inputs = collate([prompt])
    whole = torch.cat([inputs.pop("input_ids"), torch.tensor([response])], 1)
    del inputs["attention_mask"]
    blocks = [i // block_size for i in range(length)]
    blocks += [math.ceil(length / block_size) + i // block_size for i in range(len(response))]
    numbers = torch.tensor([blocks])
    first = 0
    for end in range(length, whole.shape[1] + 1, block_size):
        logits = model(
            input_ids=whole[:, first:end],
            position_ids=positions[:, :, first:end],
            block_ids=numbers[:, :end],
            past_key_values=cached,
            use_cache=True,
            **(inputs if first == 0 else {}),
        ).logits
        first = end
    return logits[0]


@pytest.mark.thorough(every=7)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@torch.no_grad()
def test_noisy_logits_are_those_of_inference(block_size: int) -> None:
    lengths = [min(block_size + 1, 12), 3, 2 * block_size if block_size < 16 else 5]
    cases = [conversation(kind, lengths, number) for number, kind in enumerate(PROMPTS)]
    rows = pack_tightly([sample for sample, _ in cases], block_size)
    inputs = inputs_of(rows)
    packed = double_model()(**inputs).logits
    single = load()(**inputs).logits
    for number, (kind, (sample, prompts)) in enumerate(zip(PROMPTS, cases, strict=True)):
        for turn, prompt in enumerate(prompts, start=1):
            row, columns = noisy_columns(rows, number, turn)
            noisy, clean = inputs["input_ids"][row, columns].tolist(), clean_response(rows, number, turn)
            start = sample.responses[turn - 1][0]
            grids = {name: grid for name, grid in collate([prompt]).items() if name.endswith("thw")}
            padded = torch.tensor([prompt.ids + clean])
            positions = double_model().get_position_ids(padded, **grids)
            assert torch.equal(positions[1:, 0, start:], rows.position_ids[1:, row, columns])
            for first in range(0, len(noisy), block_size):
                state = clean[:first] + noisy[first : first + block_size]
                place, got = f"{kind}, turn {turn}, column {first}", packed[row, columns[first : first + block_size]]
                expected = last_block_logits(double_model(), prompt, state, block_size)
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=0, msg=place)
                cached = cached_block_logits(prompt, positions, state, block_size)
                torch.testing.assert_close(got, cached[-block_size:], atol=1e-5, rtol=0, msg=place)
                single_precision = single[row, columns[first : first + block_size]].double()
                torch.testing.assert_close(single_precision, expected, atol=1e-4, rtol=0, msg=place)


@pytest.mark.parametrize(("block_size", "teacher"), [(4, 4), (8, 4), (8, 1)])
@torch.no_grad()
def test_two_noisy_copies_give_the_logits_of_rows_with_one(block_size: int, teacher: int) -> None:
    """These logits are those of inference, as the tests beside this one show."""
    samples = [
        conversation(kind, [block_size + 3, 5], n)[0] for n, kind in enumerate(["image", "video", "begun image"])
    ]
    both = pack(samples, block_size, 400, PAD, EOS, pad_to_multiple_of=16, noisy_copies=2)
    once = pack(samples, block_size, 400, PAD, EOS)
    inputs = inputs_of(both, teacher)
    logits = double_model()(**inputs).logits
    for view in range(2):
        ids = once.input_ids.clone()
        places = []
        for number, sample in enumerate(samples):
            for turn in range(1, len(sample.responses) + 1):
                row, columns = noisy_columns(once, number, turn)
                chosen = (both.sample == number) & (both.turn == turn) & both.noisy & (both.view == view)
                ids[row, columns] = inputs["input_ids"][chosen]
                places.append((row, columns, chosen))
        alone = double_model()(**{**inputs_of(once, teacher), "input_ids": ids}).logits
        for row, columns, chosen in places:
            torch.testing.assert_close(logits[chosen], alone[row, columns], atol=1e-5, rtol=0)
    noisy = [inputs["input_ids"][both.noisy & (both.view == view)] for view in range(2)]
    assert not torch.equal(*noisy)


@pytest.mark.thorough(every=3)
@pytest.mark.parametrize(("block_size", "teacher"), [(8, 4), (8, 1), (16, 4), (6, 3), (32, 8)])
@torch.no_grad()
def test_teachers_of_smaller_blocks_see_what_inference_shows_them(block_size: int, teacher: int) -> None:
    """One packed row serves both: the teacher also sees the clean tokens of earlier blocks of its own."""
    cases = [conversation(kind, [block_size + 3, 5]) for kind in ("image", "video", "begun image")]
    rows = pack_tightly([sample for sample, _ in cases], block_size)
    inputs = inputs_of(rows, teacher)
    logits = double_model()(**inputs).logits
    for number, (_, prompts) in enumerate(cases):
        for turn, prompt in enumerate(prompts, start=1):
            row, columns = noisy_columns(rows, number, turn)
            noisy, clean = inputs["input_ids"][row, columns].tolist(), clean_response(rows, number, turn)
            for first in range(0, len(noisy), teacher):
                state = clean[:first] + noisy[first : first + teacher]
                expected = last_block_logits(double_model(), prompt, state, teacher)
                got = logits[row, columns[first : first + teacher]]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_autoregressive_teacher_predicts_from_the_token_before() -> None:
    cases = [conversation(kind, [8, 5]) for kind in ("aligned text", "several images", "video")]
    rows = pack([sample for sample, _ in cases], 4, 400, PAD, EOS)
    logits = double_model()(**inputs_of(rows, 1)).logits
    for number, (sample, _) in enumerate(cases):
        inputs = {"input_ids": sample.input_ids[None], **sample.visual_inputs}
        causal = double_model()(**inputs, block_size=1).logits[0]
        for turn, (start, end) in enumerate(sample.responses, start=1):
            row, columns = noisy_columns(rows, number, turn)
            previous = rows.previous[row, columns[: end - start]]
            torch.testing.assert_close(logits[row, previous], causal[start - 1 : end - 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("folder", "case"), cases_of("packed_logits"))
@torch.no_grad()
def test_golden_packed_logits(folder: str, case: str) -> None:
    model, tensors, cases = load_golden(folder)
    golden, facts = tensors_of(tensors, case), cases[case]
    prompt, padded = facts["prompt_length"], facts["padded_response_length"]
    ids, end = golden["input_ids"][0, : prompt + padded], prompt + facts["response_length"]
    visual_inputs = {name: golden[name] for name in VISUAL if name in golden}
    positions = golden["position_ids"][:, 0, :end]
    sample = Sample(ids[:end], positions, [(prompt, end)], index_of(ids[:end]), visual_inputs)
    padding = int(golden["input_ids"][0, prompt + padded - 1])
    rows = pack([sample], facts["block_size"], 1000, PAD, padding)
    assert torch.equal(rows.position_ids[1:], golden["position_ids"])
    assert torch.equal(rows.input_ids[0, : prompt + padded], ids)
    # The reference's mask, under which these logits came about, is ours and one fault: clean responses see noisy ones.
    mask, layout = golden["attention_mask"], rows.layout()
    is_clean = (rows.stream == CLEAN) & (rows.place >= rows.origin)
    fault = is_clean[:, :, None] & layout.noisy[:, None] & (layout.rank[:, None] <= layout.rank[:, :, None])
    assert torch.equal(mask[:, 0], dense_mask(layout) | fault)
    input_ids = torch.where(rows.noisy, golden["input_ids"], rows.input_ids)
    logits = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=rows.position_ids,
        visual_index=rows.visual_index,
        **rows.visual_inputs,
    ).logits
    expected = golden["noisy_logits"]
    got = logits[:, prompt + padded :][:, : expected.shape[1]]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.thorough(every=2)
@pytest.mark.parametrize("block_size", [4, 32])
@torch.no_grad()
def test_flex_attention_gives_the_logits_of_the_dense_mask(block_size: int) -> None:
    rows = pack_tightly([conversation(kind, [9, 5])[0] for kind in ("text", "mixture", "begun image")], block_size)
    dense, flex = (double_model()(**inputs_of(rows, flex=flex)).logits for flex in (False, True))
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=0)
    smaller = double_model()(**inputs_of(rows, block_size // 2, flex=True)).logits
    assert not torch.allclose(flex, smaller, atol=1e-2)


@torch.no_grad()
def test_flex_attention_follows_autocast_as_dense_attention_does() -> None:
    rows = pack([conversation("image", [9, 5])[0]], 4, 250, PAD, EOS)
    with torch.autocast("cpu", torch.bfloat16):
        dense, flex = (load()(**inputs_of(rows, flex=flex)).logits for flex in (False, True))
    exact = load()(**inputs_of(rows)).logits
    assert (flex - exact).abs().mean() < 2 * (dense - exact).abs().mean()


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(model: BardVLForConditionalGeneration, all_inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for inputs in all_inputs:
        model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def summed_loss(rows: PackedRows) -> Callable[[torch.Tensor, torch.nn.Module], torch.Tensor]:
    """Cross entropy of the noisy tokens of the responses, summed."""
    counted = rows.noisy & ~rows.is_response_padding

    def objective(hidden_states: torch.Tensor, lm_head: torch.nn.Module) -> torch.Tensor:
        logits = lm_head(hidden_states[counted])
        return torch.nn.functional.cross_entropy(logits, rows.input_ids[counted], reduction="sum")

    return objective


def masked_inputs(rows: PackedRows) -> dict[str, Any]:
    """All noisy tokens masked: the same state however the samples are packed."""
    ids = rows.input_ids.masked_fill(rows.noisy, MASK)
    return {**inputs_of(rows), "input_ids": ids, "objective": summed_loss(rows)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_have_the_gradients_of_separate_samples(checkpointing: bool) -> None:
    samples = [conversation(kind, [9, 5], n)[0] for n, kind in enumerate(["image", "text", "mixture", "begun image"])]
    model = copy.deepcopy(double_model()).train()
    separate = [masked_inputs(pack([sample], 4, 400, PAD, EOS)) for sample in samples]
    expected = gradients(model, separate)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = pack_tightly(samples, 4, pad_to_multiple_of=64)
    packed = gradients(model, [masked_inputs(rows)])
    for name, gradient in packed.items():
        assert gradient.abs().max() > 0, name
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * max(scale, 1), rtol=0, msg=name)


def test_indexed_features_are_those_of_placeholders() -> None:
    """One turn holds every placeholder once, in order: the model's usual way must agree, in loss and gradients."""
    row = PROMPTS["mixture"]
    rows = pack([sample_of(row.add_text(9, seed=5), [(len(row.ids), len(row.ids) + 9)])], 4, 200, PAD, EOS)
    model = copy.deepcopy(double_model()).train()
    inputs = masked_inputs(rows)
    objective = inputs.pop("objective")
    indexed = gradients(model, [{**inputs, "objective": objective}])
    labels = rows.input_ids.masked_fill(~rows.noisy | rows.is_response_padding, -100)
    del inputs["visual_index"]
    counted = gradients(model, [{**inputs, "labels": labels, "num_items_in_batch": 1}])
    for name, gradient in indexed.items():
        torch.testing.assert_close(gradient, counted[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_pixels_that_nobody_shows_give_the_vision_tower_gradients_of_zero(kind: str) -> None:
    text = pack([conversation("text", [5])[0]], 4, 100, PAD, EOS)
    blank = sample_of(PROMPTS[kind], [(1, 2)]).visual_inputs
    model = copy.deepcopy(double_model()).train()
    model(**masked_inputs(text)).loss.backward()
    without = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is None for name, gradient in without.items() if ".visual." in name)
    shown = gradients(model, [masked_inputs(replace(text, visual_inputs=blank))])
    for name, gradient in shown.items():
        if ".visual." in name:
            assert not gradient.any(), name
        else:
            assert torch.equal(gradient, without[name]), name


# --- the forward's own arguments --------------------------------------------------------------------------------------


def test_objective_gets_hidden_states_and_head_and_no_logits_are_made() -> None:
    rows = pack([conversation("image", [5])[0]], 4, 100, PAD, EOS)
    inputs, given = inputs_of(rows), []

    def objective(hidden_states: torch.Tensor, lm_head: torch.nn.Module) -> torch.Tensor:
        given.append((hidden_states, lm_head))
        return hidden_states.sum()

    seen: list[dict[str, Any]] = []
    text_model = load().model.language_model
    hook = text_model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        outputs = load()(**inputs, objective=objective)
        hook.remove()
        assert seen[0]["use_cache"] is False  # nothing would read keys and values of a training step
        (hidden_states, lm_head) = given[0]
        assert lm_head is load().lm_head
        torch.testing.assert_close(lm_head(hidden_states), load()(**inputs).logits)
        assert outputs.loss == hidden_states.sum()
        assert load()(**inputs, objective=objective, return_dict=False)[0] == outputs.loss
    assert outputs.logits is None
    assert outputs.past_key_values is None


def test_dropout_that_flex_attention_would_lose_is_refused() -> None:
    rows = pack([text_sample([(3, 8)])], 4, 100, PAD, EOS)
    states = torch.zeros(1, 2, rows.input_ids.shape[1], 16)
    with pytest.raises(ValueError, match=r"no dropout of attention weights, got 0\.1"):
        block_attention(torch.nn.Identity(), states, states, states, flex_mask(rows.layout()), dropout=0.1)


def test_flex_attention_takes_the_dtype_of_the_values() -> None:
    """Under autocast norms leave queries and keys in float32; not every PyTorch casts them for FlexAttention."""
    rows = pack([text_sample([(3, 8)])], 4, 100, PAD, EOS)
    states = torch.randn(1, 2, rows.input_ids.shape[1], 16)
    arguments = {"attention_mask": flex_mask(rows.layout())}
    output, _ = block_attention(torch.nn.Identity(), states, states, states.bfloat16(), **arguments)
    assert output.dtype == torch.bfloat16


def wrong_inputs() -> dict[str, tuple[dict[str, Any], str]]:
    rows = pack([conversation("image", [5])[0]], 4, 100, PAD, EOS)
    other = pack([conversation("image", [9])[0]], 4, 100, PAD, EOS)
    index, pixels, length = rows.visual_index, rows.visual_inputs["pixel_values"], rows.input_ids.shape[1]
    return {
        "beyond": ({"visual_index": index + 1}, r"`visual_index` holds (\d+), .* give \1 visual features"),
        "below": ({"visual_index": index - 1}, "`visual_index` holds -2"),
        "shape": (
            {"visual_index": index[:, 1:]},
            rf"the shape of the tokens, \(1, {length}\), got \(1, {length - 1}\)",
        ),
        "no pixels": ({"pixel_values": None, "image_grid_thw": None}, "pixels and grids give 0 visual features"),
        "no grids": ({"image_grid_thw": None}, "`pixel_values` and `image_grid_thw` belong together"),
        "pixels": ({"pixel_values": pixels[:-4]}, f"patches, `pixel_values` holds {len(pixels) - 4}"),
        "positions": ({"position_ids": None}, "`visual_index` the positions cannot be derived"),
        "labels": ({"labels": rows.input_ids, "objective": summed_loss(rows)}, "`labels` or an `objective`, not both"),
        "mask": ({"attention_mask": flex_mask(other.layout())}, r"the `BlockMask` must be .*, got shape \(1, 1, "),
    }


@pytest.mark.parametrize("case", wrong_inputs())
def test_wrong_inputs_are_refused(case: str) -> None:
    rows = pack([conversation("image", [5])[0]], 4, 100, PAD, EOS)
    wrong, message = wrong_inputs()[case]
    with pytest.raises(ValueError, match=message):
        load()(**{**inputs_of(rows), **wrong})


def test_block_masks_need_our_own_attention() -> None:
    rows = pack([conversation("image", [5])[0]], 4, 100, PAD, EOS)
    with pytest.raises(ValueError, match="a `BlockMask` needs the attention 'bard_vl', not 'sdpa'"):
        load("sdpa")(**inputs_of(rows, flex=True))


# --- truncation and bad samples ---------------------------------------------------------------------------------------


@given(turns(), st.sampled_from([1, 3, 4, 8, 16]), st.integers(0, 150))
@hypothesis_settings(max_examples=cases(100))
def test_truncation(responses: Responses, block_size: int, max_length: int) -> None:
    sample = text_sample(responses, responses[-1][1] + 3)
    cut = truncate(sample, block_size, max_length)
    start = responses[0][0]
    if cut is None:
        assert packed_length([(start, start + 1)], start + 1, block_size) > max_length
        return
    length = packed_length(cut.responses, len(cut.input_ids), block_size)
    assert length <= max_length
    if packed_length(responses, len(sample.input_ids), block_size) <= max_length:
        assert cut is sample
        return
    *whole, (start, end) = cut.responses
    assert whole == responses[: len(whole)]
    first, behind = responses[len(whole)]
    assert first == start
    assert end == behind or (end < behind and (end - start) % block_size == 0)
    longer = [*whole, (start, min(end + block_size, behind))]
    if end < behind:
        assert packed_length(longer, len(sample.input_ids), block_size) > max_length
    else:  # the next turn was dropped: not one block of it fitted
        next_start, next_end = responses[len(cut.responses)]
        more = [*cut.responses, (next_start, min(next_start + block_size, next_end))]
        assert packed_length(more, len(sample.input_ids), block_size) > max_length
    assert torch.equal(cut.input_ids, sample.input_ids[:end])
    rows = pack([cut], block_size, max_length, PAD, EOS)
    _, columns = noisy_columns(rows, 0, len(cut.responses))
    if end < behind:
        assert not rows.is_response_padding[0, columns].any()
        assert EOS not in rows.input_ids[0, columns].tolist()
    assert torch.equal(rows.place[0, rows.twin[0, columns]], rows.place[0, columns])


def test_truncation_drops_what_no_token_shows() -> None:
    row = Row().add_text(3, seed=1).add_image((1, 4, 4), seed=2).add_video((2, 4, 4), seed=3).add_text(6, seed=4)
    first = (len(row.ids) - 5, len(row.ids))
    row = row.add_image((1, 2, 4), seed=5).add_text(5, seed=6)
    sample = sample_of(row, [first, (len(row.ids) - 5, len(row.ids))])
    cut = truncate(sample, 4, packed_length([first], first[1], 4))
    assert cut is not None
    assert cut.responses == [first]
    alone = sample_of(Row(row.ids[: first[1]], row.images[:1], row.videos), [first])
    assert torch.equal(cut.visual_index, alone.visual_index)
    assert cut.visual_inputs.keys() == alone.visual_inputs.keys()
    for name, value in alone.visual_inputs.items():
        assert torch.equal(cut.visual_inputs[name], value), name
    assert len(sample.visual_inputs["image_grid_thw"]) == 2
    rows = pack([replace(sample, responses=[first])], 4, 200, PAD, EOS)
    assert torch.equal(rows.visual_inputs["pixel_values"], alone.visual_inputs["pixel_values"])


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ([], "no assistant turn"),
        ([(5, 5)], r"the response \[5, 5\) is empty"),
        ([(5, 4)], r"the response \[5, 4\) is empty"),
        ([(0, 4)], r"the response \[0, 4\) lies outside"),
        ([(5, 21)], r"the response \[5, 21\) lies outside .* the 20 tokens"),
        ([(5, 9), (8, 12)], r"the response \[8, 12\) begins before .* at 9"),
        ([(9, 12), (2, 5)], r"the response \[2, 5\) begins before .* at 12"),
    ],
)
def test_wrong_responses_are_refused(responses: Responses, message: str) -> None:
    sample = replace(text_sample([(5, 20)], sample_id=77), responses=responses)
    with pytest.raises(ValueError, match=message):
        packed_length(responses, 20, 4)
    with pytest.raises(ValueError, match=message):
        truncate(sample, 4, 100)
    with pytest.raises(ValueError, match=rf"sample 1 \(id 77\): .*{message}"):
        pack([text_sample([(2, 5)]), sample], 4, 100, PAD, EOS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"position_ids": s.position_ids[:, 1:]}, "`position_ids` must have shape"),
        (lambda s: {"visual_index": s.visual_index[1:]}, "`visual_index` must have shape"),
        (lambda s: {"visual_index": s.visual_index + 1}, "`visual_index` holds 4, the sample has 4 visual features"),
        (lambda s: {"visual_index": s.visual_index - 1}, "`visual_index` holds -2"),
        (lambda s: {"visual_inputs": {}}, "`visual_index` holds 3, the sample has 0 visual features"),
        (
            lambda s: {"visual_inputs": {**s.visual_inputs, "pixel_values": s.visual_inputs["pixel_values"][1:]}},
            "`image_grid_thw` speaks of 16 patches, `pixel_values` holds 15",
        ),
        (lambda s: {"responses": [(7, 9)]}, r"the response \[7, 9\) holds visual tokens"),
    ],
)
def test_inconsistent_samples_are_refused(change: Callable[[Sample], dict[str, Any]], message: str) -> None:
    length = len(PROMPTS["image"].ids)
    sample = sample_of(PROMPTS["image"].add_text(5, seed=1), [(length, length + 5)], sample_id=3)
    with pytest.raises(ValueError, match=rf"sample 0 \(id 3\): {message}"):
        pack([replace(sample, **change(sample))], 4, 200, PAD, EOS)


def test_samples_longer_than_a_row_are_refused() -> None:
    sample = text_sample([(5, 9)], sample_id=12)
    assert packed_length(sample.responses, 9, 4) == 13
    with pytest.raises(ValueError, match=r"sample 0 \(id 12\) takes 13 columns in blocks of 4, `max_length` is 12"):
        pack([sample], 4, 12, PAD, EOS)
    assert pack([sample], 4, 13, PAD, EOS).input_ids.shape == (1, 13)


@pytest.mark.parametrize("block_size", [0, 3, 8])
def test_rows_are_read_under_sizes_that_divide_theirs(block_size: int) -> None:
    rows = pack([text_sample([(5, 9)])], 4, 100, PAD, EOS)
    with pytest.raises(ValueError, match=f"blocks of 4 can be read under block sizes that divide it, not {block_size}"):
        rows.layout(block_size)


@pytest.mark.parametrize(("block_size", "multiple"), [(0, 1), (4, 0)])
def test_sizes_must_be_positive(block_size: int, multiple: int) -> None:
    with pytest.raises(ValueError, match=f"must be positive, got {block_size} and {multiple}"):
        pack([], block_size, 100, PAD, EOS, multiple)
