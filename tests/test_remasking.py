"""The rules of one denoising decision against plain loops over the same numbers."""

import random

import pytest
import torch
from bard_vl.remasking_bard_vl import (
    REMASKING_RULES,
    Sampling,
    filter_scores,
    negative_entropy,
    overwritten,
    pick_tokens,
    probability_margin,
    probability_of,
    rank_by_confidence,
    remasked,
    transfer_schedule,
)
from golden_models import committed_positions
from hypothesis import assume, given
from hypothesis import strategies as st

LEVELS = [0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0]  # few, so that ties and exact thresholds are common


@st.composite
def decisions(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]], list[int], float]:
    """Confidence, masked and quota of some rows, and a threshold."""
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rng = random.Random(draw(st.integers(0, 2**32)))
    confidence = [[rng.choice(LEVELS) for _ in range(width)] for _ in range(rows)]
    masked = [[rng.random() < 0.7 for _ in range(width)] for _ in range(rows)]
    return confidence, masked, [rng.randint(1, width) for _ in range(rows)], draw(st.sampled_from(LEVELS))


@pytest.mark.parametrize("name", ["low_confidence_static", "low_confidence_dynamic"])
@given(decisions())
def test_rules_equal_the_branchy_statement(name: str, decision: tuple) -> None:
    confidence, masked, quota, threshold = decision
    commit = REMASKING_RULES[name].commit(
        torch.tensor(confidence), torch.tensor(masked), torch.tensor(quota), threshold
    )
    for row, values in enumerate(confidence):
        undecided = [place for place, is_open in enumerate(masked[row]) if is_open]
        expected = committed_positions(values, undecided, quota[row], threshold, name)
        assert commit[row].nonzero()[:, 0].tolist() == sorted(expected)


@given(decisions())
def test_ranks_order_masked_positions_by_confidence_then_place(decision: tuple) -> None:
    confidence, masked, *_ = decision
    ranks = rank_by_confidence(torch.tensor(confidence), torch.tensor(masked))
    for row, row_ranks in enumerate(ranks.tolist()):
        places = sorted(range(len(row_ranks)), key=lambda p: (not masked[row][p], -confidence[row][p] * masked[row][p]))
        assert [row_ranks[place] for place in places] == list(range(len(places)))


@given(st.integers(1, 64), st.data())
def test_schedule_spreads_a_block_over_its_steps(block_size: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, block_size))
    schedule = transfer_schedule(block_size, steps).tolist()
    assert len(schedule) == steps
    assert sum(schedule) == block_size
    assert schedule == sorted(schedule, reverse=True)
    assert max(schedule) - min(schedule) <= 1


def test_at_least_the_quota_commits_where_nothing_is_sure() -> None:
    masked = torch.tensor([[True, True, True, True]])
    for name, rule in REMASKING_RULES.items():
        # Entropies are negative; no bound allows more than the first.
        measure = torch.tensor([[0.2, 0.3, 0.1, 0.3]]) - (2 if name == "entropy_bounded" else 0)
        bound = {"entropy_bounded": 0.5, "factor": 0.5, "frechet": 0.0}.get(name, 0.9)
        assert rule.commit(measure, masked, torch.tensor([2]), bound).tolist() == [[False, True, False, True]]
        assert rule.commit(measure, masked, torch.tensor([1]), bound).tolist() == [[False, True, False, False]]


@given(decisions(), st.sampled_from([0.0, 0.25, 0.6, 1.0, 1.5, 3.0]))
def test_bounds_equal_a_walk_down_the_ranking(decision: tuple, bound: float) -> None:
    confidence, masked, quota, _ = decision
    for name in ("entropy_bounded", "factor", "frechet"):
        # Where the model is less sure its entropy is larger; any falling function serves.
        measure = torch.tensor(confidence) - (1.0 if name == "entropy_bounded" else 0.0)
        commit = REMASKING_RULES[name].commit(measure, torch.tensor(masked), torch.tensor(quota), bound)
        for row, values in enumerate(measure.tolist()):
            order = sorted((p for p, is_open in enumerate(masked[row]) if is_open), key=lambda p: (-values[p], p))
            allowed = [
                n
                for n in range(1, len(order) + 1)
                if {
                    "entropy_bounded": sum(-values[p] for p in order[: n - 1]) <= bound,
                    "factor": (n + 1) * (1 - values[order[n - 1]]) < bound,
                    "frechet": sum(values[p] for p in order[:n]) - (n - 1) - (1 - values[order[n - 1]]) > bound,
                }[name]
            ]
            expected = order[: max([quota[row], *allowed])]
            assert commit[row].nonzero()[:, 0].tolist() == sorted(expected)


def test_measures_are_what_they_say() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 3
    probabilities = logits.double().softmax(-1)
    first, second = probabilities.topk(2).values.unbind(-1)
    torch.testing.assert_close(probability_margin(logits, first).double(), first - second, atol=1e-6, rtol=0)
    entropy = torch.distributions.Categorical(probs=probabilities).entropy()
    torch.testing.assert_close(negative_entropy(logits, first).double(), -entropy, atol=1e-5, rtol=0)
    banned = logits.index_fill(-1, torch.arange(10), float("-inf"))
    assert negative_entropy(banned, first).isfinite().all()


def test_revision_changes_what_is_visible_and_nothing_else() -> None:
    block, visible = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[True, True, True, False]])
    ids, confidence = torch.tensor([[1, 9, 9, 9]]), torch.tensor([[0.99, 0.95, 0.5, 0.99]])
    assert overwritten(block, visible, ids, confidence, 0.9).tolist() == [[False, True, False, False]]
    present = torch.tensor([[0.05, 0.2, 0.09, 0.0]])
    assert remasked(present, visible, 0.1).tolist() == [[True, False, True, False]]


def test_threshold_is_exclusive() -> None:
    confidence, masked = torch.tensor([[0.5, 0.75, 0.8]]), torch.ones(1, 3, dtype=torch.bool)
    commit = REMASKING_RULES["low_confidence_dynamic"].commit(confidence, masked, torch.tensor([1]), 0.75)
    assert commit.tolist() == [[False, False, True]]


@given(st.integers(0, 2**32), st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.integers(0, 6))
def test_mask_token_is_never_chosen(seed: int, mask: int, temperature: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 5, generator=generator)
    logits[..., mask] += 50
    ids = pick_tokens(logits, mask, Sampling(temperature, top_k, 0.9), generator)
    assert (ids != mask).all()
    assert logits[..., mask].min() > 40, "the model's logits are read only"


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.7, 2.0]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_confidence_is_the_models_own_probability(seed: int, temperature: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(2, 3, 7, generator=generator)).to(dtype)
    ids = pick_tokens(logits, 6, Sampling(temperature, top_k=4, top_p=0.8), generator)
    confidence = probability_of(logits, ids)
    expected = logits.float().softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert confidence.dtype == torch.float32
    torch.testing.assert_close(confidence, expected)
    if temperature == 0:
        assert torch.equal(ids, logits[..., :6].argmax(-1))


def test_probability_of_the_mask_token_lowers_confidence() -> None:
    logits = torch.tensor([[[1.0, 1.0, 3.0]]])
    ids = pick_tokens(logits, mask_token_id=2)
    assert ids.tolist() == [[0]]
    assert probability_of(logits, ids).item() == pytest.approx(torch.tensor([1.0, 1.0, 3.0]).softmax(0)[0].item())


def test_samples_follow_the_softmax_at_the_temperature() -> None:
    logits, draws = torch.tensor([2.0, 1.0, 0.0, 5.0, -1.0]), 40_000
    ids = pick_tokens(logits.expand(1, draws, 5), 3, Sampling(2.0), torch.Generator().manual_seed(0))
    expected = logits.clone().index_fill_(0, torch.tensor(3), float("-inf")).div(2).softmax(0)
    torch.testing.assert_close(ids.flatten().bincount(minlength=5) / draws, expected, atol=0.01, rtol=0)


@given(st.integers(0, 2**32), st.integers(0, 9), st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.95, 1.0]))
def test_filters_keep_the_top_k_then_the_nucleus(seed: int, top_k: int, top_p: float) -> None:
    scores = 3 * torch.randn(8, generator=torch.Generator().manual_seed(seed))
    ranked = sorted(range(8), key=lambda token: -scores[token].item())[: top_k or 8]
    weights = [scores[token].double().exp().item() for token in ranked]
    reached = [sum(weights[: end + 1]) / sum(weights) for end in range(len(ranked))]
    assume(all(abs(share - top_p) > 1e-5 for share in reached[:-1]))
    kept = ranked[: 1 + sum(share < top_p for share in reached[:-1])]
    filtered = filter_scores(scores, top_k, top_p)
    assert filtered.isfinite().nonzero()[:, 0].tolist() == sorted(kept)
    assert torch.equal(filtered[kept], scores[kept])


def test_top_k_keeps_ties_and_nucleus_keeps_one() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert filter_scores(scores, 2, 1.0).isfinite().tolist() == [[False, True, True, False, True]]
    assert filter_scores(torch.tensor([[0.0, 9.0, 1.0]]), 0, 1e-9).isfinite().tolist() == [[False, True, False]]


def test_same_generator_state_same_sample() -> None:
    logits = torch.randn(2, 16, 50, generator=torch.Generator().manual_seed(1))
    runs = [pick_tokens(logits, 49, Sampling(1.0), torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
