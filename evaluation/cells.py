"""The cells of the study, as data: which stages of training, and how the result is decoded.

Budgets are counted in units of `Scale.unit` optimizer steps. All ways to one block size get the same number
of units: one for each stage of progressive block merging, and one to finish.
"""

from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Literal

SIZES = (4, 8, 16, 32)
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
TeacherName = Literal["anchor", "long anchor", "large anchor", "autoregressive"]


@dataclass(frozen=True)
class Stage:
    """One training run at one block size; block size 0 is autoregressive training.

    Attributes:
        block_size: tokens per block.
        units: optimizer steps, in units.
        teacher: distil from it: the chain's first stage, another one with ten times its steps, that of the
            larger model, or the parent.
        ce_weight, kd_weight: of the cross entropy, and of the divergence from the teacher.
        kd_positions: where the teacher is followed.
        noise: mask, uniform or mixed.
        visible_weight: in the loss, of tokens that the noise left alone.
        draft_share: of the masks, whose place the model's own drafts take.
        loss_form: of the loss; the committed results were made with "corrupted_mean".
        padding_weight: of the padding behind an answer, None for the form's own.
        complementary_masks: two noisy copies of each answer, the second of which masks what the first shows.
        faulty_mask: clean tokens see the noisy ones of their block and of earlier blocks, as in the reference.
        rate: share of the peak learning rate.
        large: the larger model.
    """

    block_size: int
    units: int = 1
    teacher: TeacherName | None = None
    ce_weight: float = 0.0
    kd_weight: float = 1.0
    kd_positions: Literal["all", "fair"] = "all"
    noise: Literal["mask", "uniform", "mixed"] = "mask"
    complementary_masks: bool = False
    faulty_mask: bool = False
    rate: float = 1.0
    large: bool = False
    visible_weight: float = 0.0
    draft_share: float = 0.0
    loss_form: Literal["sample_mean", "corrupted_mean", "inverse_time"] = "corrupted_mean"
    padding_weight: float | None = None


@dataclass(frozen=True)
class Decoding:
    """The settings of decoding."""

    threshold: float
    revision: Literal["overwrite", "remask"] | None = None


@dataclass(frozen=True)
class Cell:
    """One point of the study: the parent through `stages`, decoded in every way of `decodings`."""

    name: str
    stages: tuple[Stage, ...]
    decodings: tuple[Decoding, ...] = tuple(map(Decoding, THRESHOLDS))

    @property
    def block_size(self) -> int:
        """Tokens per block at decoding; 0 for the autoregressive parent."""
        return self.stages[-1].block_size if self.stages else 0

    @property
    def units(self) -> int:
        """Optimizer steps behind the parent, in units."""
        return sum(stage.units for stage in self.stages)


def merging(block_size: int, **settings: object) -> tuple[Stage, ...]:
    """Progressive block merging up to a block size."""
    sizes = [*takewhile(lambda size: size < block_size, SIZES), block_size]
    return tuple(Stage(size, **settings) for size in sizes)  # type: ignore[arg-type]


def ways(block_size: int) -> tuple[Cell, ...]:
    """Direct, warm, and warm with distillation from the parent and from the anchor, in equal steps."""
    merged = merging(block_size)
    finish = partial(Stage, block_size, rate=FINISHING_RATE)
    return (
        Cell(f"direct-{block_size}", (Stage(block_size, len(merged) + 1),)),
        Cell(f"warm-{block_size}", (*merged, finish())),
        Cell(f"swd-{block_size}", (*merged, finish(teacher="anchor"))),
        Cell(f"ar-distilled-{block_size}", (*merged, finish(teacher="autoregressive"))),
    )


FINISHING_RATE = 0.5
LONGEST = len(SIZES) + 1
REVISIONS = tuple(Decoding(0.9, revision) for revision in (None, "overwrite", "remask"))

# A larger budget, with an anchor that has had as many steps as its student.
LONG = (*(Stage(size, 2) for size in (4, 8, 16)), Stage(32, 4))
LONG_ANCHOR = (Stage(4, sum(stage.units for stage in LONG)),)
LONG_CELLS = (
    Cell("long-warm-32", (*LONG, Stage(32, 2, rate=FINISHING_RATE))),
    Cell("long-direct-32", (Stage(32, LONG_ANCHOR[0].units + 2),)),
    Cell("long-anchor-4", LONG_ANCHOR),
    Cell("long-swd-32", (*LONG, Stage(32, 2, teacher="long anchor", rate=FINISHING_RATE))),
)

# In the order of the claims that they decide.
CELLS = (
    *ways(32),
    Cell("block-1", (Stage(1, LONGEST),), (Decoding(0.9),)),
    *LONG_CELLS,
    Cell("parent", (), (Decoding(1.0),)),
    Cell("anchor-4", merging(4)),
    Cell("swd-long-anchor-32", (*merging(32), Stage(32, teacher="long anchor", rate=FINISHING_RATE))),
    *ways(16),
    Cell("faulty-mask-8", merging(8, faulty_mask=True)),
    Cell("right-mask-8", merging(8)),
    Cell("mask-noise-8", merging(8), REVISIONS),
    Cell("mixed-noise-8", merging(8, noise="mixed"), REVISIONS),
    Cell("uniform-noise-8", merging(8, noise="uniform"), REVISIONS),
    Cell("mixed-noise-visible-8", merging(8, noise="mixed", visible_weight=1.0), REVISIONS),
    Cell("draft-noise-visible-8", merging(8, draft_share=0.5, visible_weight=1.0), REVISIONS),
    Cell("swd+ce-32", (*merging(32), Stage(32, teacher="anchor", ce_weight=1.0, rate=FINISHING_RATE))),
    *ways(8),
    Cell("warm-4", (*merging(4), Stage(4, rate=FINISHING_RATE))),
    Cell("ar-continued", (Stage(0, LONGEST),), (Decoding(1.0),)),
    Cell("large-teacher-32", (*merging(32), Stage(32, teacher="large anchor", rate=FINISHING_RATE))),
)
