"""Corruption follows the paper's formulas; the noise of a sample hangs on the sample, the step and the seed alone."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from bard_vl.training.noise import (
    NOISE_KINDS,
    TIME_SCHEMES,
    Corrupted,
    corrupt,
    corrupt_rows,
    corruption_probabilities,
    noise_generator,
    replacement_ids,
    sample_times,
)
from bard_vl.training.packing import CLEAN, NEVER, PackedRows, Sample, pack

VOCAB_SIZE, MASK, EOS, SPECIAL = 64, 60, 61, (0, 61, 62)
REPLACEMENTS = replacement_ids(VOCAB_SIZE, MASK, SPECIAL)
BLOCK = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_share(chosen: torch.Tensor, probability: float) -> None:
    """The share of True is within 4 standard errors; with none at 0 or 1, where it must be exact."""
    error = math.sqrt(probability * (1 - probability) / chosen.numel())
    share = chosen.double().mean().item()
    assert abs(share - probability) <= 4 * error, f"share {share:.5f}, expected {probability:.5f} +- {error:.5f}"


def expected(kind: str, t: float) -> tuple[float, float]:
    phi = math.pi * t / 2
    return {
        "mask": (1 - t, 0.0),
        "uniform": (0.0, 1 - t),
        "mixed": (1 - math.sin(phi), max(math.cos(phi) + math.sin(phi) - 1, 0.0)),
    }[kind]


def conversation(sample_id: int, turns: list[tuple[int, int]]) -> Sample:
    """A sample without pictures: turns of (prompt, response) tokens."""
    length, responses = 0, []
    for prompt, response in turns:
        responses.append((length + prompt, length + prompt + response))
        length += prompt + response
    ids = torch.randint(1, MASK, (length,), generator=generator(sample_id))
    positions = torch.arange(length).expand(3, -1)
    return Sample(ids, positions, responses, torch.full((length,), -1), sample_id=sample_id)


CONVERSATIONS = [
    conversation(11, [(5, 30), (3, 9), (9, 16)]),
    conversation(12, [(16, 40)]),
    conversation(13, [(2, 1), (3, 21)]),  # both turns have a block of the same number
]


def packed(samples: list[Sample], max_length: int = 1024, noisy_copies: int = 1) -> PackedRows:
    return pack(samples, BLOCK, max_length, pad_token_id=0, response_padding_id=EOS, noisy_copies=noisy_copies)


def corrupted(
    rows: PackedRows, kind: str = "mixed", scheme: str = "block", seed: int = 3, step: int = 4, **changes: Any
) -> Corrupted:
    return corrupt_rows(rows, BLOCK, kind, scheme, MASK, REPLACEMENTS, seed, step, **changes)


def by_sample(rows: PackedRows, noise: Corrupted) -> dict[int, list[torch.Tensor]]:
    """The noisy tokens of each sample in the order of their turns and places: ids, masked, replaced, t."""
    found = {}
    for number, sample_id in enumerate(rows.sample_ids.tolist()):
        chosen = rows.noisy & (rows.sample == number)
        order = (rows.turn[chosen] * 10_000 + rows.place[chosen]).argsort()
        found[sample_id] = [field[chosen][order] for field in noise]
    return found


@pytest.mark.parametrize("t", [0.0, 0.05, 0.25, 0.5, 0.6, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_shares_at_a_time(kind: str, t: float) -> None:
    ids = torch.randint(1, MASK, (100_000,), generator=generator(1))
    noise = corrupt(ids, torch.tensor(t), kind, MASK, REPLACEMENTS, generator(2))
    masked, replaced = expected(kind, t)
    assert_share(noise.masked, masked)
    assert_share(noise.replaced, replaced)
    assert_share(noise.ids == ids, 1 - masked - replaced)
    probabilities = corruption_probabilities(kind, torch.tensor(t))
    torch.testing.assert_close(torch.stack(probabilities), torch.tensor([masked, replaced]), atol=1e-6, rtol=0)


def test_drafts_take_a_share_of_the_masks_and_leave_the_rest_of_the_noise() -> None:
    rows = packed([conversation(number, [(3, 60)]) for number in range(20, 60)], noisy_copies=2)
    alone, half, whole = (corrupted(rows, draft_share=share) for share in (0.0, 0.5, 1.0))
    for other in (half, whole):
        assert all(map(torch.equal, alone[:4], other[:4]))
    assert not alone.drafted.any()
    assert_share(half.drafted[alone.masked], 0.5)
    assert not half.drafted[~alone.masked].any()
    assert torch.equal(whole.drafted, whole.masked)


@pytest.mark.parametrize(
    ("kind", "masked", "replaced"),
    [("mask", 0.5, 0.0), ("uniform", 0.0, 0.5), ("mixed", 1 - 2 / math.pi, 4 / math.pi - 1)],
)
def test_shares_over_all_times(kind: str, masked: float, replaced: float) -> None:
    """Mixed noise: .363 masked, .273 replaced, .363 clean."""
    t = sample_times(300_000, "block", generator(3))
    noise = corrupt(torch.full_like(t, 7, dtype=torch.long), t, kind, MASK, REPLACEMENTS, generator(4))
    assert_share(noise.masked, masked)
    assert_share(noise.replaced, replaced)


@pytest.mark.parametrize("original", [1, 7, 59, EOS])  # first, middle and last of the replacements, and none of them
def test_replacements_are_the_other_ids_each_as_often(original: int) -> None:
    count = 200_000
    ids = torch.full((count,), original)
    noise = corrupt(ids, torch.zeros(()), "uniform", MASK, REPLACEMENTS, generator(5))
    assert noise.replaced.all()
    others = [token for token in REPLACEMENTS.tolist() if token != original]
    shares = noise.ids.bincount(minlength=VOCAB_SIZE) / count
    assert shares.nonzero()[:, 0].tolist() == others
    error = math.sqrt(1 / len(others) / count)
    assert (shares[others] - 1 / len(others)).abs().max() < 4 * error


def test_replacements_leave_out_the_mask_and_what_is_special() -> None:
    assert replacement_ids(6, 4, {1, 5}).tolist() == [0, 2, 3]
    assert replacement_ids(6, 4, {1, 5}, allow_special=True).tolist() == [0, 1, 2, 3, 5]
    assert replacement_ids(4, 9, [11, 2]).tolist() == [0, 1, 3]  # the mask token may lie behind the vocabulary


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_flags_say_what_happened(kind: str) -> None:
    ids = torch.randint(1, MASK, (40, 50), generator=generator(6))
    noise = corrupt(ids, torch.full((40, 1), 0.4), kind, MASK, REPLACEMENTS, generator(7))
    assert not (noise.masked & noise.replaced).any()
    assert torch.equal(noise.masked, noise.ids == MASK)
    assert torch.equal(noise.corrupted, noise.ids != ids)
    assert torch.isin(noise.ids[noise.replaced], REPLACEMENTS).all()
    assert torch.equal(noise.t, torch.full((40, 50), 0.4))


def test_noise_repeats_with_the_generator_alone() -> None:
    ids, t = torch.randint(1, MASK, (500,), generator=generator(8)), torch.tensor(0.5)
    torch.manual_seed(1)
    first = corrupt(ids, t, "mixed", MASK, REPLACEMENTS, generator(9))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = corrupt(ids, t, "mixed", MASK, REPLACEMENTS, generator(9))
    other = corrupt(ids, t, "mixed", MASK, REPLACEMENTS, generator(10))
    torch.manual_seed(1)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    assert torch.equal(torch.get_rng_state(), state)  # no draw came from the global generator


def test_times_of_a_sample_are_one() -> None:
    times = torch.stack([sample_times(6, "sample", generator(seed)) for seed in range(2000)])
    assert (times == times[:, :1]).all()
    assert abs(times[:, 0].mean() - 0.5) < 4 * math.sqrt(1 / 12 / 2000)


def test_times_of_blocks_are_independent() -> None:
    times = torch.stack([sample_times(4, "block", generator(seed)) for seed in range(4000)])
    assert (times.mean(0) - 0.5).abs().max() < 4 * math.sqrt(1 / 12 / 4000)
    assert (times.T.corrcoef() - torch.eye(4)).abs().max() < 4 / math.sqrt(4000)


def test_stratified_times_hit_every_stratum_once_in_any_order() -> None:
    times = torch.stack([sample_times(8, "stratified", generator(seed)) for seed in range(4000)])
    strata = (times * 8).long()
    assert (strata.sort(-1).values == torch.arange(8)).all()
    for stratum in range(8):
        assert_share(strata[:, 0] == stratum, 1 / 8)
    within = times * 8 - strata
    assert abs(within.mean() - 0.5) < 4 * math.sqrt(1 / 12 / within.numel())


@pytest.mark.parametrize("scheme", TIME_SCHEMES)
def test_times_stay_in_their_range(scheme: str) -> None:
    times = torch.cat([sample_times(50, scheme, generator(seed), 0.2, 0.7) for seed in range(200)])
    assert 0.2 <= times.min() < 0.21
    assert 0.69 < times.max() <= 0.7
    assert sample_times(0, scheme, generator()).shape == (0,)
    assert (sample_times(3, scheme, generator(), 1.0, 1.0) == 1).all()


@pytest.mark.parametrize("scheme", TIME_SCHEMES)
def test_only_noisy_copies_of_rows_are_corrupted(scheme: str) -> None:
    rows = packed(CONVERSATIONS, max_length=200)
    before = rows.input_ids.clone()
    noise = corrupted(rows, scheme=scheme)
    assert torch.equal(rows.input_ids, before)
    assert not (noise.corrupted & ~rows.noisy).any()
    assert torch.equal(noise.ids != rows.input_ids, noise.corrupted)
    assert (noise.t[~rows.noisy] == 1).all()
    assert noise.corrupted[rows.is_response_padding & rows.noisy].any()
    twins = rows.input_ids.gather(1, rows.twin.clamp(min=0))
    assert torch.equal(twins[rows.noisy], rows.input_ids[rows.noisy])


def times_of_blocks(rows: PackedRows, noise: Corrupted, number: int) -> list[float]:
    """The one time of each block of a sample, turn by turn."""
    times = []
    rank = rows.layout(BLOCK).rank
    for turn in range(1, int(rows.turn[rows.sample == number].max()) + 1):
        mine = rows.noisy & (rows.sample == number) & (rows.turn == turn)
        for block in rank[mine].unique():
            (time,) = noise.t[mine & (rank == block)].unique().tolist()
            times.append(time)
    return times


def test_blocks_of_rows_have_the_times_of_the_scheme() -> None:
    rows = packed(CONVERSATIONS, max_length=200)
    num_blocks = [4 + 2 + 2, 5, 1 + 3]
    for number, expected_blocks in enumerate(num_blocks):
        times = {scheme: times_of_blocks(rows, corrupted(rows, scheme=scheme), number) for scheme in TIME_SCHEMES}
        assert len(set(times["sample"])) == 1
        assert len(set(times["block"])) == expected_blocks
        strata = sorted(int(time * expected_blocks) for time in times["stratified"])
        assert strata == list(range(expected_blocks))


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("scheme", TIME_SCHEMES)
def test_a_sample_has_the_same_noise_in_any_packing(kind: str, scheme: str) -> None:
    alone: dict[int, list[torch.Tensor]] = {}
    for sample in CONVERSATIONS:
        rows = packed([sample])
        alone |= by_sample(rows, corrupted(rows, kind, scheme))
    for samples, max_length in ((CONVERSATIONS, 1024), (CONVERSATIONS[::-1], 1024), (CONVERSATIONS, 200)):
        rows = packed(samples, max_length)
        for sample_id, fields in by_sample(rows, corrupted(rows, kind, scheme)).items():
            assert all(torch.equal(mine, other) for mine, other in zip(fields, alone[sample_id], strict=True))


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("scheme", TIME_SCHEMES)
def test_the_second_copy_complements_the_first(kind: str, scheme: str) -> None:
    """Token by token; the first has the noise that it has alone, in any packing."""
    alone = by_sample(packed(CONVERSATIONS), corrupted(packed(CONVERSATIONS), kind, scheme))
    rows = packed(CONVERSATIONS, 400, noisy_copies=2)
    noise = corrupted(rows, kind, scheme)
    first = replace(rows, stream=torch.where(rows.view == 1, CLEAN, rows.stream))
    for sample_id, fields in by_sample(first, noise).items():
        assert all(torch.equal(mine, other) for mine, other in zip(fields, alone[sample_id], strict=True))
    where = {}
    for place in rows.noisy.nonzero().tolist():
        names = (rows.sample, rows.turn, rows.place, rows.view)
        where[tuple(int(values[tuple(place)]) for values in names)] = tuple(place)
    seen = set()
    for (*token, view), one in where.items():
        if view:
            continue
        two = where[(*token, 1)]
        states = ["masked" if noise.masked[p] else "replaced" if noise.replaced[p] else "left" for p in (one, two)]
        seen.add(tuple(states))
        assert noise.t[two] == 1 - noise.t[one]
        for place, state in zip((one, two), states, strict=True):
            clean, shown = rows.input_ids[place], noise.ids[place]
            assert (shown == MASK) == (state == "masked")
            assert (shown == clean) == (state == "left")
    pairs = {"mask": ["masked"], "uniform": ["replaced"], "mixed": ["masked"]}[kind]
    expected = {pair for state in pairs for pair in ((state, "left"), ("left", state))}
    assert seen == expected | ({("replaced", "replaced")} if kind == "mixed" else set())
    if kind == "mixed":
        again = noise.ids[rows.noisy & noise.replaced & (rows.view == 1)]
        assert not torch.equal(again, noise.ids[rows.noisy & noise.replaced & (rows.view == 0)])


def test_noise_of_rows_does_not_hang_on_the_order_of_columns() -> None:
    rows = packed([CONVERSATIONS[0]])
    order = torch.randperm(rows.input_ids.shape[1], generator=generator(1))
    shuffled = PackedRows(
        **{
            name: value[..., order] if name not in ("block_size", "visual_inputs", "sample_ids") else value
            for name, value in vars(rows).items()
        }
    )
    noise, other = corrupted(rows), corrupted(shuffled)
    assert all(torch.equal(a[:, order], b) for a, b in zip(noise, other, strict=True))


def test_noise_differs_between_samples_steps_and_seeds() -> None:
    rows = packed([CONVERSATIONS[1]])
    renamed = packed([conversation(12, [(16, 40)])])
    assert torch.equal(corrupted(rows).ids, corrupted(renamed).ids)
    renamed.sample_ids += 1
    others = [corrupted(rows, step=5), corrupted(rows, seed=4), corrupted(renamed)]
    assert all(not torch.equal(corrupted(rows).masked, other.masked) for other in others)


def test_noise_differs_between_the_times_that_a_step_has_a_sample() -> None:
    rows = packed([CONVERSATIONS[1], CONVERSATIONS[1]])
    first, second = by_sample_number(rows, corrupted(rows, repeats=torch.tensor([0, 1, 0])))
    assert torch.equal(first, by_sample_number(rows, corrupted(rows))[0])
    assert not torch.equal(first, second)


def by_sample_number(rows: PackedRows, noise: Corrupted) -> list[torch.Tensor]:
    return [noise.ids[rows.noisy & (rows.sample == number)] for number in range(len(rows.sample_ids))]


def test_noise_is_the_same_in_every_process() -> None:
    """Fixed numbers: neither hash randomisation nor the platform plays a part."""
    assert noise_generator(1, 2, 3).initial_seed() == 2989668377
    assert torch.rand(3, generator=noise_generator(1, 2, 3)).tolist() == pytest.approx(
        [0.10195, 0.328412, 0.119961], abs=1e-6
    )


def test_rows_without_samples_stay_clean() -> None:
    rows = packed([])
    noise = corrupted(rows)
    assert torch.equal(noise.ids, rows.input_ids)
    assert not noise.corrupted.any()


IDS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corruption_probabilities("cosine", torch.tensor(0.5)), r"kind of noise.*'cosine'"),
        (lambda: corruption_probabilities("mask", torch.tensor([0.5, 1.5])), r"\[0, 1\], got 1.5"),
        (lambda: corruption_probabilities("mixed", torch.tensor([-0.5])), r"\[0, 1\], got -0.5"),
        (lambda: corruption_probabilities("mask", torch.tensor([float("nan")])), r"\[0, 1\], got nan"),
        (lambda: sample_times(3, "token", generator()), r"scheme of times.*'token'"),
        (lambda: sample_times(-1, "block", generator()), r"number of blocks.*-1"),
        (lambda: sample_times(3, "block", generator(), 0.5, 0.2), r"low 0.5 and high 0.2"),
        (lambda: sample_times(3, "block", generator(), 0.0, 1.2), r"high 1.2"),
        (lambda: replacement_ids(3, 0, [1, 2]), r"no id is left.*vocabulary of 3"),
        (lambda: replacement_ids(0, 0), r"vocabulary of 0"),
        (lambda: corrupt(IDS, torch.tensor(0.5), "mask", 2, REPLACEMENTS, generator()), r"mask token 2 already"),
        (lambda: corrupt(IDS, torch.tensor(0.5), "mixed", MASK, torch.tensor([5]), generator()), r"two ids, got \[5\]"),
        (lambda: corrupt(IDS, torch.tensor(0.5), "uniform", MASK, torch.tensor([5, 4]), generator()), r"must ascend"),
        (lambda: corrupt(IDS, torch.tensor(0.5), "mixed", 9, REPLACEMENTS, generator()), r"mask token 9 must not be"),
    ],
)
def test_bad_values_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_answers_with_an_order_stand_before_a_random_step_of_each_block() -> None:
    orders = [
        torch.tensor([[0, 2, NEVER, 1, 1, 0, 2, 0], [0] * 8]).flatten(),
        torch.tensor([1, 1, 3, 1, NEVER, 0, 2, 0]),
    ]
    written = replace(conversation(21, [(5, 14), (3, 7)]), orders=orders)
    alone, among = packed([written]), packed([*CONVERSATIONS, written], noisy_copies=2)
    blocks = [*orders[0].split(8), orders[1]]
    seen: list[set[int]] = [set(), set(), set()]
    for seed in range(40):
        noise = corrupted(alone, "mixed", seed=seed)
        assert not noise.replaced.any()
        assert torch.equal(noise.ids, alone.input_ids.masked_fill(noise.masked, MASK))
        masked = by_sample(alone, noise)[21][1].split(8)
        for number, (order, hidden) in enumerate(zip(blocks, masked, strict=True)):
            steps = sorted(set(order.tolist()) - {NEVER})
            (at,) = [step for step in range(steps[-1] + 1) if torch.equal(hidden, order >= step)]
            seen[number].add(at)
        beside = corrupted(among, "mixed", seed=seed)
        first = (among.sample == 3) & among.noisy & (among.view == 0)
        assert torch.equal(beside.masked[first], noise.masked[alone.noisy])
        others = (among.sample < 3) & among.noisy & (among.view == 0)
        plain = corrupted(packed(CONVERSATIONS, noisy_copies=2), "mixed", seed=seed)
        assert beside.masked[others].sum() == plain.masked[packed(CONVERSATIONS, noisy_copies=2).view == 0].sum()
    assert seen == [{0, 1, 2}, {0}, {0, 1, 2, 3}]


@pytest.mark.parametrize("order", [[0] * 7, [0] * 7 + [-1]])
def test_an_order_covers_whole_blocks(order: list[int]) -> None:
    written = replace(conversation(21, [(5, 7)]), orders=[torch.tensor(order)])
    with pytest.raises(ValueError, match=r"id 21.*order of the response \[5, 12\) must be 8 steps of at least 0"):
        packed([written])
    with pytest.raises(ValueError, match="2 orders for 1 responses"):
        packed([replace(written, orders=written.orders * 2)])
