"""The cells of the study, as data: which stages of training, and how the result is decoded.

Budgets are counted in units of `Scale.unit` optimizer steps.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
TOKENS_PER_STEP = (1, 2, 4)
FINISHING_RATE = 0.5
REVISIONS: tuple[Literal["overwrite", "remask"] | None, ...] = (None, "overwrite", "remask")


@dataclass(frozen=True)
class Stage:
    """One training run at one block size.

    Attributes:
        block_size: tokens per block.
        units: optimizer steps, in units.
        teacher: distil from it: the study's anchor, or the autoregressive parent.
        ce_weight, kd_weight: of the cross entropy, and of the divergence from the teacher.
        kd_positions: where the teacher is followed.
        noise: mask, uniform or mixed.
        complementary_masks: two noisy copies of each answer, the second of which masks what the first shows.
        batch_share: of the samples of a step.
        faulty_mask: clean tokens see the noisy ones of their block and of earlier blocks, as in the reference.
        rate: share of the peak learning rate.
        visible_weight: in the loss, of tokens that the noise left alone.
        draft_share: of the masks, whose place the model's own drafts take.
        certainty_weight: of the entropy of predictions that are right already.
        loss_form: of the loss.
        padding_weight: of the padding behind an answer, None for the form's own.
    """

    block_size: int
    units: int = 1
    teacher: Literal["anchor", "autoregressive"] | None = None
    ce_weight: float = 0.0
    kd_weight: float = 1.0
    kd_positions: Literal["all", "fair"] = "all"
    noise: Literal["mask", "uniform", "mixed"] = "mask"
    complementary_masks: bool = False
    batch_share: float = 1.0
    faulty_mask: bool = False
    rate: float = 1.0
    visible_weight: float = 0.0
    draft_share: float = 0.0
    certainty_weight: float = 0.0
    loss_form: Literal["sample_mean", "corrupted_mean", "inverse_time"] = "corrupted_mean"
    padding_weight: float | None = None


@dataclass(frozen=True)
class Decoding:
    """The settings of decoding: a threshold of confidence, or a fixed number of tokens per step."""

    threshold: float | None = None
    revision: Literal["overwrite", "remask"] | None = None
    tokens_per_step: int | None = None


CURVE = tuple(map(Decoding, THRESHOLDS))
STATIC = tuple(Decoding(tokens_per_step=number) for number in TOKENS_PER_STEP)
# What decides comes first; one token a step takes as long as all of these.
FEWER = (Decoding(0.9), Decoding(tokens_per_step=2), Decoding(0.8), Decoding(0.95), STATIC[2], Decoding(0.7))
REVISED = tuple(Decoding(threshold, revision) for revision in REVISIONS for threshold in THRESHOLDS)


@dataclass(frozen=True)
class Cell:
    """One point of the study: the parent through `stages`, decoded in every way of `decodings`."""

    name: str
    stages: tuple[Stage, ...]
    decodings: tuple[Decoding, ...] = (*CURVE, *STATIC)

    @property
    def block_size(self) -> int:
        """Tokens per block at decoding; 0 for the autoregressive parent."""
        return self.stages[-1].block_size if self.stages else 0

    @property
    def units(self) -> int:
        """Optimizer steps behind the parent, in units."""
        return sum(stage.units for stage in self.stages)


def finishes(before: tuple[Stage, ...], units: int, decodings: tuple[Decoding, ...]) -> tuple[Cell, ...]:
    """The same model finished at block 32 in several ways, in equal steps."""
    last = partial(Stage, 32, units, rate=FINISHING_RATE)
    return (
        Cell("cross-entropy", (*before, last()), decodings),
        Cell("swd", (*before, last(teacher="anchor")), decodings),
        Cell("fair-swd", (*before, last(teacher="anchor", kd_positions="fair")), decodings),
        Cell("swd+ce", (*before, last(teacher="anchor", ce_weight=1.0)), decodings),
        Cell("on-policy", (*before, last(draft_share=0.5, visible_weight=1.0)), (*REVISED, *STATIC[1:])),
    )


PARENT = Cell("parent", (), (Decoding(),))
HALF = Stage(32, 4, complementary_masks=True, batch_share=0.5)

# In the order in which they run: what decides most comes first. The unit of both has 50 steps.
ANCHOR = (Stage(4, 4),)
PILOT_CELLS = (
    Cell("plain", (Stage(32, 4),), FEWER),
    Cell("complementary", (HALF,), FEWER),
    *finishes((Stage(32, 4),), 3, FEWER),
    Cell("certainty", (Stage(32, 4, certainty_weight=0.5),), FEWER),
    Cell("complementary-all", (replace(HALF, batch_share=1.0),), FEWER),
    Cell("anchor", ANCHOR, CURVE),
    PARENT,
)

LARGER_ANCHOR = (Stage(4, 24),)
DIRECT = partial(Stage, 32, 24)
MERGED = tuple(Stage(size, 6) for size in (4, 8, 16))
LARGER_CELLS = (
    Cell("plain", (DIRECT(),)),
    Cell("complementary", (DIRECT(complementary_masks=True, batch_share=0.5),)),
    *finishes(MERGED, 6, (*CURVE, *STATIC)),
    Cell("parent-distilled", (*MERGED, Stage(32, 6, teacher="autoregressive", rate=FINISHING_RATE))),
    Cell("mixed-noise", (DIRECT(noise="mixed"),)),
    Cell("faulty-mask", (DIRECT(faulty_mask=True),)),
    Cell("anchor", LARGER_ANCHOR, CURVE),
    PARENT,
)

# Captions of one form, on which some claims were decided: the unit has 100 steps.
ONCE_REVISED = tuple(Decoding(0.9, revision) for revision in REVISIONS)


def merged_8(name: str, **settings: Any) -> Cell:
    """The parent at blocks 4 and 8 under some noise."""
    return Cell(name, (Stage(4, **settings), Stage(8, **settings)), ONCE_REVISED)


FIXED_CELLS = (
    Cell("block-1", (Stage(1, 5),), (Decoding(0.9),)),
    Cell("block-4", (Stage(4, 10),), tuple(map(Decoding, (0.5, *THRESHOLDS, 0.99)))),
    merged_8("mask-noise-8"),
    merged_8("uniform-noise-8", noise="uniform"),
    merged_8("mixed-noise-8", noise="mixed"),
    merged_8("mixed-noise-visible-8", noise="mixed", visible_weight=1.0),
    PARENT,
)
