"""Losses equal the reference's, packed rows equal separate ones, and chunks equal whole logits in far less memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bard_vl import BardVLForConditionalGeneration
from bard_vl.training.losses import (
    LOSS_FORMS,
    LinearLosses,
    kl_divergence,
    linear_losses,
    position_weights,
    top_k_divergence,
)
from bard_vl.training.noise import Corrupted, corrupt_rows, corruption_probabilities, replacement_ids
from bard_vl.training.packing import PackedRows, Sample, dense_mask, pack
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = Path(__file__).parent / "golden"
MASK, EOS, BLOCK = 510, 511, 4


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "untied" / "cases.safetensors")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# The reference's values


def test_weighted_cross_entropy_is_the_references(golden: dict[str, torch.Tensor]) -> None:
    case = {name.split(".", 1)[1]: value for name, value in golden.items() if name.startswith("weighted_ce.")}
    corrupted, noisy = case["loss_mask"], case["response_mask"]
    sample = torch.arange(2)[:, None].expand(2, 12)
    weights, normaliser = position_weights(
        "inverse_time", corrupted, case["t"], noisy, sample, torch.zeros_like(corrupted)
    )
    entropy = F.cross_entropy(case["logits"].flatten(0, 1), case["labels"].flatten(), reduction="none").view(2, 12)
    torch.testing.assert_close((weights * entropy).sum() / normaliser, case["value"][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_truncated_divergence_is_the_references(
    golden: dict[str, torch.Tensor], direction: str, temperature: float
) -> None:
    student, expected = golden["topk_kd.student_logits"], golden[f"topk_kd.{direction}-kl.{temperature}"][0]
    values, ids = golden["topk_kd.teacher_topk_logits"], golden["topk_kd.teacher_topk_indices"]
    found = top_k_divergence(student, values, ids, direction, temperature).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    teacher = torch.full_like(student, -50.0).scatter(-1, ids, values)
    found = kl_divergence(student, teacher, direction, temperature, top_k=16).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# Divergences


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergence_is_that_of_distributions(temperature: float) -> None:
    student, teacher = random(5, 40, seed=1), random(5, 40, seed=2)
    p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    forward = kl_divergence(student, teacher, "forward", temperature)
    reverse = kl_divergence(student, teacher, "reverse", temperature)
    torch.testing.assert_close(forward, (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(reverse, (p * (p / q).log()).sum(-1))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_top_k_of_the_whole_vocabulary_has_the_gradient_of_the_divergence(direction: str) -> None:
    student, teacher = random(5, 40, seed=3).requires_grad_(), random(5, 40, seed=4)
    (whole,) = torch.autograd.grad(kl_divergence(student, teacher, direction, 2.0).sum(), student)
    (top,) = torch.autograd.grad(kl_divergence(student, teacher, direction, 2.0, top_k=40).sum(), student)
    torch.testing.assert_close(top, whole)


@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradients_of_divergences(direction: str, top_k: int | None) -> None:
    student, teacher = random(3, 12, seed=5).requires_grad_(), random(3, 12, seed=6)
    assert torch.autograd.gradcheck(lambda logits: kl_divergence(logits, teacher, direction, 1.5, top_k), student)


def test_half_precision_logits_give_float32_losses() -> None:
    logits = random(4, 30, dtype=torch.bfloat16)
    assert kl_divergence(logits, -logits).dtype == torch.float32
    assert kl_divergence(logits, -logits, top_k=5).dtype == torch.float32
    torch.testing.assert_close(kl_divergence(logits, -logits), kl_divergence(logits.float(), -logits.float()))


# Chunks


class Problem:
    """n hidden states of a student and a teacher with heads of their own, targets and weights."""

    def __init__(self, n: int = 21, vocab_size: int = 50, dtype: torch.dtype = torch.float64) -> None:
        self.hidden = random(n, 6, seed=1, dtype=dtype).requires_grad_()
        self.head = random(vocab_size, 6, seed=2, dtype=dtype).requires_grad_()
        self.teacher_hidden = random(n, 9, seed=3, dtype=dtype).requires_grad_()
        self.teacher_head = random(vocab_size, 9, seed=4, dtype=dtype).requires_grad_()
        self.targets = torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(5))
        self.weights = random(n, seed=6).abs().float()

    def losses(self, with_teacher: bool, **settings) -> LinearLosses:
        teacher = (self.teacher_hidden, self.teacher_head) if with_teacher else None
        return linear_losses(self.hidden, self.head, self.targets, self.weights, teacher=teacher, **settings)

    def whole(
        self, ce_weight: float, kd_weight: float, direction: str, temperature: float, top_k: int | None
    ) -> torch.Tensor:
        """The same loss with all logits at once, spelled out."""
        logits, teacher_logits = self.hidden @ self.head.T, (self.teacher_hidden @ self.teacher_head.T).detach()
        losses = ce_weight * F.cross_entropy(logits, self.targets, reduction="none")
        divergence = kl_divergence(logits, teacher_logits, direction, temperature, top_k)
        return ((losses + kd_weight * temperature**2 * divergence) * self.weights).sum()

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.head))


MIXTURES = {
    "cross entropy": (1.0, 0.0, "forward", 1.0, None),
    "paper": (0.0, 1.0, "forward", 1.0, None),
    "reference": (1.0, 0.5, "forward", 1.0, 16),
    "reverse": (0.3, 0.7, "reverse", 2.0, None),
    "reverse, top k": (1.0, 2.0, "reverse", 0.5, 5),
}


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 21, 1000])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_chunks_give_the_loss_and_gradients_of_whole_logits(mixture: str, chunk_size: int) -> None:
    problem, (ce_weight, kd_weight, direction, temperature, top_k) = Problem(), MIXTURES[mixture]
    expected = problem.whole(*MIXTURES[mixture])
    found = problem.losses(
        kd_weight > 0,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        direction=direction,
        temperature=temperature,
        top_k=top_k,
        chunk_size=chunk_size,
    )
    torch.testing.assert_close(found.loss, expected)
    for mine, other in zip(problem.gradients(found.loss), problem.gradients(expected), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("chunk_size", [4, 1000])
@pytest.mark.parametrize("mixture", ["cross entropy", "reference"])
def test_certainty_is_the_entropy_of_what_is_right_already(mixture: str, chunk_size: int) -> None:
    problem, (ce_weight, kd_weight, direction, temperature, top_k) = Problem(), MIXTURES[mixture]
    logits = problem.hidden @ problem.head.T
    problem.targets[::3] = logits.argmax(-1)[::3]
    expected = problem.whole(*MIXTURES[mixture])
    for position, target in enumerate(problem.targets.tolist()):
        shares = (logits[position] / 0.7).softmax(-1)
        if logits[position].argmax() == target:
            expected = expected - 0.4 * problem.weights[position] * (shares * shares.log()).sum()
    settings = {"ce_weight": ce_weight, "kd_weight": kd_weight, "direction": direction, "temperature": temperature}
    certainty = {"certainty_weight": 0.4, "certainty_temperature": 0.7}
    found = problem.losses(kd_weight > 0, top_k=top_k, chunk_size=chunk_size, **settings, **certainty)
    torch.testing.assert_close(found.loss, expected)
    for mine, other in zip(problem.gradients(found.loss), problem.gradients(expected), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("chunk_size", [4, 1000])
@pytest.mark.parametrize("mixture", ["paper", "reference", "reverse"])
def test_where_the_teacher_is_not_followed_cross_entropy_takes_both_weights(mixture: str, chunk_size: int) -> None:
    problem, (ce_weight, kd_weight, direction, temperature, top_k) = Problem(), MIXTURES[mixture]
    taught = torch.arange(len(problem.targets)) % 3 > 0
    settings = {"direction": direction, "temperature": temperature, "top_k": top_k}
    weights = {"ce_weight": ce_weight, "kd_weight": kd_weight}
    found = problem.losses(True, taught=taught, chunk_size=chunk_size, **weights, **settings)
    every = problem.weights.clone()
    problem.weights = every * taught
    expected = problem.whole(ce_weight, kd_weight, direction, temperature, top_k)
    problem.weights = every * ~taught
    expected = expected + problem.whole(ce_weight + kd_weight, 0.0, direction, temperature, top_k)
    torch.testing.assert_close(found.loss, expected)
    for mine, other in zip(problem.gradients(found.loss), problem.gradients(expected), strict=True):
        torch.testing.assert_close(mine, other)
    assert (found.divergence[~taught] == 0).all()


def test_losses_of_positions_are_reported_and_detached() -> None:
    problem = Problem()
    found = problem.losses(True, ce_weight=0.5, kd_weight=1.0, temperature=2.0, chunk_size=4)
    logits, teacher_logits = problem.hidden @ problem.head.T, problem.teacher_hidden @ problem.teacher_head.T
    torch.testing.assert_close(found.cross_entropy, F.cross_entropy(logits, problem.targets, reduction="none").detach())
    torch.testing.assert_close(found.divergence, kl_divergence(logits, teacher_logits, "forward", 2.0).detach())
    assert not found.cross_entropy.requires_grad
    assert not found.divergence.requires_grad
    assert problem.losses(False).divergence is None


def test_no_gradient_reaches_the_teacher() -> None:
    problem = Problem()
    problem.losses(True, kd_weight=1.0, chunk_size=4).loss.backward()
    assert problem.hidden.grad.abs().sum() > 0
    assert problem.teacher_hidden.grad is None
    assert problem.teacher_head.grad is None


def test_the_factor_of_the_temperature_keeps_gradients_of_one_size() -> None:
    """At high temperatures the gradient of tau^2 KL no longer hangs on tau (Hinton et al. 2015)."""
    problem = Problem()
    norms = []
    for temperature in (100.0, 200.0):
        found = problem.losses(True, ce_weight=0.0, kd_weight=1.0, temperature=temperature)
        expected = (temperature**2 * found.divergence * problem.weights).sum()
        torch.testing.assert_close(found.loss.detach(), expected)
        norms.append(problem.gradients(found.loss)[0].norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=0.05, atol=0)


def test_a_module_is_called_as_a_head() -> None:
    """With what it adds to its weight: a bias, an adapter, a hook."""
    problem = Problem()
    head = nn.Linear(6, 50, dtype=torch.float64)
    found = linear_losses(problem.hidden, head, problem.targets, problem.weights, chunk_size=5)
    logits = head(problem.hidden)
    expected = (F.cross_entropy(logits, problem.targets, reduction="none") * problem.weights).sum()
    torch.testing.assert_close(found.loss, expected)
    mine, other = (torch.autograd.grad(loss, (head.weight, head.bias)) for loss in (found.loss, expected))
    torch.testing.assert_close(mine, other)


def test_bfloat16_hidden_states_give_float32_losses() -> None:
    problem = Problem(n=200, dtype=torch.bfloat16)
    found = problem.losses(True, kd_weight=1.0, chunk_size=64)
    assert found.loss.dtype == found.cross_entropy.dtype == found.divergence.dtype == torch.float32
    logits = (problem.hidden @ problem.head.T).float()
    entropy = F.cross_entropy(logits, problem.targets, reduction="none").detach()
    torch.testing.assert_close(found.cross_entropy, entropy)
    assert not torch.equal(entropy, entropy.bfloat16().float())
    found.loss.backward()
    assert problem.hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("with_teacher", [False, True])
def test_no_positions_give_zero_with_a_graph(with_teacher: bool) -> None:
    problem = Problem(n=3)
    chosen = problem.weights < 0
    teacher = (problem.teacher_hidden[chosen], problem.teacher_head) if with_teacher else None
    found = linear_losses(
        problem.hidden[chosen], problem.head, problem.targets[chosen], problem.weights[chosen], teacher=teacher
    )
    assert found.loss.item() == 0
    assert found.cross_entropy.shape == (0,)
    for gradient, tensor in zip(problem.gradients(found.loss), (problem.hidden, problem.head), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_weights_of_zero_give_zero_with_a_graph() -> None:
    problem = Problem()
    problem.weights.zero_()
    found = problem.losses(True, kd_weight=1.0, chunk_size=4)
    assert found.loss.item() == 0
    for gradient in problem.gradients(found.loss):
        assert torch.equal(gradient, torch.zeros_like(gradient))


# Memory


class LiveMemory(TorchDispatchMode):
    """The largest tensor that any operation returns, and the most that live at once, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        for tensor in returned if isinstance(returned, tuple | list) else (returned,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                elements = storage.nbytes() // tensor.element_size()
                self.largest = max(self.largest, elements)
                self._live[storage._cdata] = (StorageWeakRef(storage), elements)
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return returned


VOCAB_SIZE, CHUNK = 2000, 16


def memory_of(n: int, chunk_size: int, mixture: str) -> LiveMemory:
    problem = Problem(n, VOCAB_SIZE, torch.float32)
    ce_weight, kd_weight, direction, temperature, top_k = MIXTURES[mixture]
    with LiveMemory() as memory:
        found = problem.losses(
            kd_weight > 0,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            direction=direction,
            temperature=temperature,
            top_k=top_k,
            chunk_size=chunk_size,
        )
        forward = memory.largest
        found.loss.backward()
    assert forward > 0
    return memory


@pytest.mark.thorough(every=5)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_no_tensor_of_positions_by_vocabulary_exists(mixture: str) -> None:
    """Forward and backward; neither at once nor as the sum of chunks that are kept."""
    n = 40 * CHUNK
    memory, whole = memory_of(n, CHUNK, mixture), memory_of(n, n, mixture)
    assert whole.largest == n * VOCAB_SIZE  # what is measured would show
    assert memory.largest == CHUNK * VOCAB_SIZE
    assert memory.peak < 10 * CHUNK * VOCAB_SIZE < n * VOCAB_SIZE < whole.peak
    twice = memory_of(2 * n, CHUNK, mixture)
    assert twice.peak - memory.peak <= 40 * n  # hidden states and losses grow, not what has a vocabulary


# Weights of positions


def positions(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers])


@pytest.mark.parametrize(("padding_weight", "visible_weight"), [(None, 0.0), (0.0, 0.0), (0.25, 0.5)])
def test_the_papers_form_is_the_mean_within_each_sample_then_over_samples(
    padding_weight: float | None, visible_weight: float
) -> None:
    """Read sample by sample, for long and short ones, over several rows; one of them has nothing corrupted."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 40, 7, 3, 90, 1]
    sample = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)] + [-1] * 6).view(2, 75)
    noisy = sample >= 0
    draw, padding, losses = (torch.rand(sample.shape, generator=generator, dtype=torch.float64) for _ in range(3))
    corrupted, padding = noisy & (draw < 0.6) & (sample != 4), noisy & (padding < 0.3)
    weights, normaliser = position_weights(
        "sample_mean", corrupted, draw, noisy, sample, padding, padding_weight, noisy & ~corrupted, visible_weight
    )
    means = []
    for number in range(len(lengths)):
        total = count = 0.0
        for place in (sample == number).nonzero().tolist():
            weight = 1.0 if corrupted[tuple(place)] else visible_weight
            if padding[tuple(place)] and padding_weight is not None:
                weight *= padding_weight
            total, count = total + weight * losses[tuple(place)].item(), count + weight
        means.append(total / max(1.0, count))
    assert normaliser == len(lengths)
    assert (weights * losses).sum().item() / normaliser == pytest.approx(sum(means) / len(means), rel=1e-6)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("padding_weight", [None, 0.0, 0.25])
def test_weights_of_the_mean_over_all_samples(padding_weight: float | None) -> None:
    corrupted, noisy = positions(0, 1, 1, 0, 1).bool(), positions(0, 1, 1, 1, 1).bool()
    padding = positions(0, 0, 0, 0, 1).bool()
    sample = positions(-1, 0, 0, 1, 1)
    weights, normaliser = position_weights(
        "corrupted_mean", corrupted, torch.full((1, 5), 0.3), noisy, sample, padding, padding_weight
    )
    weight = 1.0 if padding_weight is None else padding_weight
    assert weights.tolist() == [[0, 1, 1, 0, weight]]
    assert weights.dtype == torch.float32
    assert normaliser == 2 + weight


def test_weights_of_the_references_form() -> None:
    corrupted, noisy = positions(0, 1, 1, 0, 0, 1, 1).bool(), positions(0, 1, 1, 1, 1, 1, 1).bool()
    padding, sample = positions(0, 0, 0, 0, 0, 0, 1).bool(), positions(-1, 0, 0, 0, 0, 2, 2)
    probability = torch.tensor([[0.0, 0.5, 0.2, 0.0, 0.5, 0.1, 0.1]])
    weights, normaliser = position_weights("inverse_time", corrupted, probability, noisy, sample, padding)
    torch.testing.assert_close(weights, torch.tensor([[0, 2 / 4, 5 / 4, 0, 0, 10 / 2, 0.5 * 10 / 2]]))
    assert normaliser == 2  # samples 0 and 2


@pytest.mark.parametrize(
    ("form", "expected", "normaliser"),
    [
        ("corrupted_mean", [0, 1, 0.5, 0, 1, 0.125], 2.625),
        ("inverse_time", [0, 1.25, 0.25, 0, 1.25, 0.0625], 2),
        ("sample_mean", [0, 1 / 1.5, 0.5 / 1.5, 0, 1 / 1.125, 0.125 / 1.125], 2),
    ],
)
def test_tokens_that_the_noise_left_alone_weigh_as_asked(form: str, expected: list[float], normaliser: float) -> None:
    corrupted, visible = positions(0, 1, 0, 0, 1, 0).bool(), positions(0, 0, 1, 0, 0, 1).bool()
    padding, sample = positions(0, 0, 0, 0, 0, 1).bool(), positions(-1, 0, 0, -1, 1, 1)
    arguments = (form, corrupted, torch.full((1, 6), 0.4), corrupted | visible, sample, padding, 0.25)
    weights, found = position_weights(*arguments, visible=visible, visible_weight=0.5)
    torch.testing.assert_close(weights, torch.tensor([expected]))
    assert found == normaliser
    plain = position_weights(*arguments)[0]
    if form == "sample_mean":  # where what is visible shares in the mean
        assert plain.tolist() == corrupted.float().tolist()
    else:
        assert torch.equal(weights * corrupted, plain)


@pytest.mark.parametrize("form", LOSS_FORMS)
def test_rows_without_noise_weigh_nothing(form: str) -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    weights, normaliser = position_weights(form, nothing, torch.zeros(2, 3), nothing, torch.full((2, 3), -1), nothing)
    assert torch.equal(weights, torch.zeros(2, 3))
    assert normaliser == 0


@pytest.mark.parametrize("kind", ["mask", "uniform", "mixed"])
def test_inverse_time_weighs_every_token_once_on_average(kind: str) -> None:
    """E[corrupted / P(corrupted)] = 1: the sum of the weights over samples is 1 within its standard error."""
    length, t = 200_000, 0.4
    probability = sum(corruption_probabilities(kind, torch.full((1, length), t)))
    drawn = torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < probability
    noisy, zeros = torch.ones_like(drawn), torch.zeros(1, length, dtype=torch.long)
    weights, normaliser = position_weights("inverse_time", drawn, probability, noisy, zeros, zeros.bool())
    chance = probability[0, 0].item()
    error = ((1 - chance) / chance / length) ** 0.5
    assert abs(weights.sum().item() / normaliser - 1) < 4 * error


# Packed rows equal separate ones


def conversation(sample_id: int, turns: list[tuple[int, int]]) -> Sample:
    length, responses = 0, []
    for prompt, response in turns:
        responses.append((length + prompt, length + prompt + response))
        length += prompt + response
    ids = torch.randint(500, (length,), generator=torch.Generator().manual_seed(sample_id))
    positions = torch.arange(length).expand(3, -1)
    return Sample(ids, positions, responses, torch.full((length,), -1), sample_id=sample_id)


CONVERSATIONS = [conversation(1, [(5, 6), (3, 9)]), conversation(2, [(8, 3)]), conversation(3, [(3, 14)])]


@pytest.fixture(scope="module")
def model() -> BardVLForConditionalGeneration:
    return BardVLForConditionalGeneration.from_pretrained(GOLDEN / "tied").double().eval()


def loss_and_normaliser(
    model: BardVLForConditionalGeneration, samples: list[Sample], form: str, kind: str, max_length: int = 256
) -> tuple[torch.Tensor, float]:
    rows: PackedRows = pack(samples, BLOCK, max_length, pad_token_id=0, response_padding_id=EOS)
    replacements = replacement_ids(500, MASK)
    noise: Corrupted = corrupt_rows(rows, BLOCK, kind, "block", MASK, replacements, seed=0, step=0)
    probability = sum(corruption_probabilities(kind, noise.t))
    weights, normaliser = position_weights(
        form, noise.corrupted, probability, rows.noisy, rows.sample, rows.is_response_padding
    )
    chosen = weights > 0

    def objective(hidden: torch.Tensor, head: nn.Module) -> torch.Tensor:
        return linear_losses(hidden[chosen], head, rows.input_ids[chosen], weights[chosen], chunk_size=5).loss

    mask = dense_mask(rows.layout())[:, None]
    outputs = model(input_ids=noise.ids, attention_mask=mask, position_ids=rows.position_ids, objective=objective)
    return outputs.loss, normaliser


@pytest.mark.parametrize("kind", ["mask", "mixed"])
@pytest.mark.parametrize("form", LOSS_FORMS)
def test_packed_rows_give_the_loss_and_gradients_of_separate_ones(
    model: BardVLForConditionalGeneration, form: str, kind: str
) -> None:
    parameters = list(model.model.language_model.parameters())

    def gradients(losses: list[tuple[torch.Tensor, float]]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = sum(loss for loss, _ in losses) / max(1, sum(normaliser for _, normaliser in losses))
        return loss, torch.autograd.grad(loss, parameters)

    separate = gradients([loss_and_normaliser(model, [sample], form, kind) for sample in CONVERSATIONS])
    for samples, max_length in ((CONVERSATIONS, 256), (CONVERSATIONS[::-1], 256), (CONVERSATIONS, 64)):
        packed = gradients([loss_and_normaliser(model, samples, form, kind, max_length)])
        torch.testing.assert_close(packed[0], separate[0], rtol=1e-6, atol=0)
        for mine, other in zip(packed[1], separate[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", LOSS_FORMS)
def test_two_noisy_copies_give_the_mean_of_the_losses_and_gradients_of_two_rows(
    model: BardVLForConditionalGeneration, form: str
) -> None:
    parameters = list(model.model.language_model.parameters())
    both = pack(CONVERSATIONS, BLOCK, 400, pad_token_id=0, response_padding_id=EOS, noisy_copies=2)
    once = pack(CONVERSATIONS, BLOCK, 400, pad_token_id=0, response_padding_id=EOS)
    noise = corrupt_rows(both, BLOCK, "mixed", "block", MASK, replacement_ids(500, MASK), seed=0, step=0)

    def in_order(rows: PackedRows, view: int) -> tuple[torch.Tensor, ...]:
        where = (rows.noisy & (rows.view == view)).nonzero(as_tuple=True)
        order = (10_000 * rows.sample + 1000 * rows.turn + rows.place)[where].argsort()
        return tuple(index[order] for index in where)

    def loss(
        rows: PackedRows, ids: torch.Tensor, corrupted: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        probability = sum(corruption_probabilities("mixed", t))
        weights, normaliser = position_weights(
            form, corrupted, probability, rows.noisy, rows.answer, rows.is_response_padding
        )
        chosen = weights > 0

        def objective(hidden: torch.Tensor, head: nn.Module) -> torch.Tensor:
            return linear_losses(hidden[chosen], head, rows.input_ids[chosen], weights[chosen]).loss

        mask = dense_mask(rows.layout())[:, None]
        given = {"attention_mask": mask, "position_ids": rows.position_ids, "objective": objective}
        return model(input_ids=ids, **given).loss, normaliser

    packed = loss(both, noise.ids, noise.corrupted, noise.t)
    separate = []
    for view in range(2):
        ids, t, corrupted = once.input_ids.clone(), torch.ones(once.noisy.shape), torch.zeros_like(once.noisy)
        for target, source in ((ids, noise.ids), (t, noise.t), (corrupted, noise.corrupted)):
            target[in_order(once, 0)] = source[in_order(both, view)]
        separate.append(loss(once, ids, corrupted, t))
    assert packed[1] == sum(normaliser for _, normaliser in separate)
    losses = [packed[0] / packed[1], sum(loss for loss, _ in separate) / packed[1]]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(each, parameters) for each in losses]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


# Sharded parameters


class Sharded(nn.Module):
    """An embedding and a head whose loss is computed in its forward, as the model's objective is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 6), nn.Linear(6, 50, bias=False)

    def forward(self, ids: torch.Tensor, by_weight: bool) -> torch.Tensor:
        head = self.head.weight if by_weight else self.head
        return linear_losses(self.embed(ids), head, ids.flip(0), torch.ones(len(ids)), chunk_size=4).loss


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.usefixtures("one_process")
def test_sharded_parameters_get_the_same_gradients(by_weight: bool) -> None:
    ids = torch.arange(10)
    whole, sharded = Sharded(), Sharded()
    fully_shard(sharded, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
    assert isinstance(sharded.head.weight, DTensor)
    for module in (whole, sharded):
        module(ids, by_weight).backward()
    for mine, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), other.grad)
    with pytest.raises(TypeError, match="head's weight is still sharded"):
        linear_losses(torch.zeros(1, 6), sharded.head, torch.zeros(1).long(), torch.ones(1))


# Bad values

LOGITS = torch.zeros(2, 30)
FLAGS = torch.ones(1, 2, dtype=torch.bool)


def weigh(form: str = "corrupted_mean", noisy: torch.Tensor = FLAGS, padding_weight: float | None = None) -> None:
    position_weights(form, FLAGS, torch.ones(1, 2), noisy, torch.zeros(1, 2).long(), ~FLAGS, padding_weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weigh("mean"), r"form of the loss.*'mean'"),
        (lambda: weigh(padding_weight=-0.5), r"response padding.*-0.5"),
        (lambda: weigh(noisy=~FLAGS), r"outside the noisy responses"),
        (lambda: kl_divergence(LOGITS, LOGITS, "sideways"), r"direction.*'sideways'"),
        (lambda: kl_divergence(LOGITS, LOGITS, temperature=0.0), r"temperature.*positive, got 0.0"),
        (lambda: kl_divergence(LOGITS, LOGITS, temperature=float("nan")), r"temperature.*got nan"),
        (lambda: kl_divergence(LOGITS, LOGITS, top_k=31), r"`top_k`.*vocabulary of 30, got 31"),
        (lambda: kl_divergence(LOGITS, LOGITS, top_k=0), r"`top_k`.*got 0"),
        (lambda: kl_divergence(LOGITS, LOGITS[:, :20]), r"share a vocabulary, got 30 and 20"),
        (lambda: Problem().losses(False, certainty_weight=-0.1), r"weight of certainty.*got -0.1"),
        (lambda: Problem().losses(False, certainty_temperature=0.0), r"temperature of certainty.*got 0.0"),
        (lambda: Problem().losses(False, chunk_size=0), r"chunk size.*got 0"),
        (lambda: Problem().losses(False, kd_weight=0.5), r"weight 0.5 needs a teacher"),
        (lambda: Problem().losses(True, ce_weight=0.0), r"CE 0.0 and KD 0.0"),
        (lambda: Problem().losses(True, ce_weight=-1.0, kd_weight=2.0), r"CE -1.0 and KD 2.0"),
        (lambda: Problem().losses(True, kd_weight=1.0, top_k=51), r"vocabulary of 50, got 51"),
        (lambda: Problem().losses(True, kd_weight=1.0, temperature=-1.0), r"positive, got -1.0"),
        (lambda: Problem().losses(True, kd_weight=1.0, taught=FLAGS[0]), r"taught must be \(21,\), got \(2,\)"),
        (
            lambda: linear_losses(torch.zeros(3, 6), torch.zeros(50, 6), torch.zeros(2).long(), torch.zeros(3)),
            r"got \(3, 6\), \(2,\) and \(3,\)",
        ),
        (
            lambda: linear_losses(
                torch.zeros(3, 6),
                torch.zeros(50, 6),
                torch.zeros(3).long(),
                torch.zeros(3),
                teacher=(torch.zeros(2, 6), torch.zeros(50, 6)),
                kd_weight=1.0,
            ),
            r"teacher has hidden states of 2 positions, the student of 3",
        ),
    ],
)
def test_bad_values_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
