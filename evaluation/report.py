"""Tables and plots of the study, from the JSON files of its cells alone."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from .cells import FIXED_CELLS, LARGER_CELLS, PILOT_CELLS, REVISIONS, THRESHOLDS, TOKENS_PER_STEP

Run = dict[str, Any]
Score = dict[str, Any]
Runs = dict[str, list[Run]]
FINDINGS = Path(__file__).with_name("findings.md")  # what a reader sees in the committed figures
SPEED = 3.0  # tokens per forward at which validity is compared, and claimed at equal accuracy
THRESHOLD = 0.9
MARGIN = 2.0  # points below block size 1 that count as equal
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571)  # two-sided, for 2 to 6 seeds
CLAIMS = {
    "Complementary masks beat plain ones at equal compute": ("complementary", "plain"),
    "With all samples, at twice the compute, they beat plain ones": ("complementary-all", "plain"),
    "Certainty beats cross entropy alone": ("certainty", "plain"),
    "SWD finishes better than cross entropy": ("swd", "cross-entropy"),
    "SWD and cross entropy together finish better than cross entropy": ("swd+ce", "cross-entropy"),
    "Fair SWD finishes better than cross entropy": ("fair-swd", "cross-entropy"),
    "On-policy noise finishes better than plain noise": ("on-policy", "cross-entropy"),
    "Distillation from the parent finishes better than cross entropy": ("parent-distilled", "cross-entropy"),
    "Mixed noise beats mask noise": ("mixed-noise", "plain"),
    "The right mask beats the reference's": ("plain", "faulty-mask"),
}
FREE = {"pilot": PILOT_CELLS, "larger": LARGER_CELLS, "smoke": PILOT_CELLS}
FIXED_CLAIMS = {
    "For plain decoding mask noise beats uniform noise": (("mask-noise-8", None), ("uniform-noise-8", None)),
    "Where only corrupted tokens are learnt, `overwrite` beats no revision": (
        *(("mixed-noise-8", "overwrite"), ("mixed-noise-8", None)),
    ),
    "Where visible tokens are learnt too, `overwrite` beats no revision": (
        *(("mixed-noise-visible-8", "overwrite"), ("mixed-noise-visible-8", None)),
    ),
}
ABOUT = """Every figure below comes from the JSON files in `results/`; `python -m bard_vl.evaluation.small_study
--report` writes this page again. Pictures show three to five coloured shapes on a grid of 4 x 4, half of them a word
too; those that answers are about were never trained on. Tokens per forward count every forward, the prompt's included.
Arms are paired by seed: ± is half a 95 % t interval over seeds, p is McNemar's, exact, over the answers of all
seeds."""
FREE_CAPTIONS = """Captions are free in form: a thing is "at a4 a large blue circle" or "a large blue circle at a4", of
equal length, and no picture tells which, so tokens that are decided together must agree. A parser judges: an answer is
*valid* if it is a caption in all its words, *right* if all that it says is true too; F1 counts facts (things, and the
word). Validity at a speed is read off the line through the thresholds."""
COLOURS = {
    "plain": "#b0413e",
    "complementary": "#e0a030",
    "complementary-all": "#8a6d3b",
    "certainty": "#d98cb3",
    "cross-entropy": "#303030",
    "swd": "#7a8ca0",
    "swd+ce": "#6a4c93",
    "fair-swd": "#1f6f8b",
    "on-policy": "#5a8f3c",
}
Settings = dict[str, Any]  # of decoding
# None for validity at a speed, which no single answers have.
MEASURES: dict[str, Settings | None] = {
    f"at {SPEED:g} tokens per forward": None,
    f"at threshold {THRESHOLD}": {"threshold": THRESHOLD},
    "at 2 tokens a step": {"tokens_per_step": 2},
}


def read_runs(results: Path) -> Runs:
    """Finished runs by the name of their cell, one for each seed."""
    runs: Runs = defaultdict(list)
    for path in sorted(results.glob("*.json")):
        run = read_run(path)
        runs[run["cell"]].append(run)
    return dict(runs)


def read_run(path: Path) -> Run:
    """The figures of a cell; `ValueError` names a file that holds none."""
    try:
        run = json.loads(path.read_bytes())
        run["cell"], run["scores"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return run


def write_report(results: Path, output: Path) -> Path:
    """Write `SMALL_STUDY.md` and its plot into a folder; returns the path of the text."""
    folder = output / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    scales = {name: runs for name in FREE if (runs := read_runs(results / name))}
    fixed = read_runs(results / "fixed")
    sections = ["# The small-scale study\n\n" + (ABOUT if scales or fixed else "No cell has been run yet.")]
    findings = FINDINGS.read_text("utf-8").strip() if output == FINDINGS.parent else ""
    for name, runs in scales.items():
        plot = plot_trade_off(runs, folder / f"trade_off_{name}.png")
        sections += [
            f"## Free captions, scale `{name}`\n\n{FREE_CAPTIONS}\n\n{sizes(runs)}",
            claims(runs),
            findings if name == "pilot" else "",
            "### Validity\n\n" + validity_table(runs, FREE[name]),
            f"![validity against tokens per forward](plots/{plot.name})" if plot else "",
            "### Beside validity\n\n" + other_table(runs, FREE[name]),
            revision_table(runs.get("on-policy", [])),
        ]
    if fixed:
        sections.append(fixed_section(fixed))
    sections.append(missing({**scales, "fixed": fixed}))
    path = output / "SMALL_STUDY.md"
    path.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return path


def sizes(runs: Runs) -> str:
    """Models, data and budgets of the measurements."""
    every = [run for group in runs.values() for run in group]
    first = every[0]
    seeds = ", ".join(map(str, sorted({run["seed"] for run in every})))
    seconds = {tuple(map(repr, run["stages"])): run["stages"][-1]["seconds"] for run in every if run["stages"]}
    return (
        f"Qwen3-VL's architecture with {first['parameters'] / 1e6:.1f}M parameters; an autoregressive parent of "
        f"{first['parent_steps']:,} steps; {first['scenes']:,} scenes to train on; {first['batch_size']} samples a "
        f"step, peak rate {first['rate']:g}; {first['answers']} held-out answers of {first['answer_length']} tokens on "
        f"average with the end of sequence, the same for all; seeds {seeds}. The last stages of all cells took "
        f"{sum(seconds.values()) / 3600:.1f} hours."
    )


# --- Figures of a run -------------------------------------------------------------------------------------------------


def score_at(run: Run, **settings: Any) -> Score | None:
    """The run's score by some settings of decoding, the others unset."""
    wanted = {"threshold": None, "revision": None, "tokens_per_step": None, **settings}
    return next((s for s in run["scores"] if all(s.get(name) == value for name, value in wanted.items())), None)


def of_score(run: Run, name: str, **settings: Any) -> Any:
    """One figure of that score, None where there is none."""
    score = score_at(run, **settings)
    return None if score is None else score.get(name)


def curve(run: Run, name: str = "valid", revision: str | None = None) -> list[tuple[float, float]]:
    """(tokens per forward, figure) over thresholds, slowest first."""
    scores = [s for s in run["scores"] if s["threshold"] is not None and s["revision"] == revision]
    return sorted((score["tokens_per_forward"], score[name]) for score in scores)


def at_speed(run: Run, revision: str | None = None, speed: float = SPEED) -> float | None:
    """Valid answers at so many tokens per forward, between the two nearest thresholds; None beyond all of them."""
    points = curve(run, revision=revision)
    for (slow, first), (fast, second) in pairwise(points):
        if slow <= speed <= fast:
            return first + (second - first) * (speed - slow) / max(fast - slow, 1e-9)
    return None


def shown(values: Iterable[float | None], digits: int = 1) -> str:
    """Each seed's figure, and their mean if there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    each = ", ".join(f"{value:.{digits}f}" for value in known)
    return each if len(known) == 1 else f"{statistics.fmean(known):.{digits}f} ({each})"


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table; the first column is text, the others are numbers."""
    names = list(header)
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def validity_table(runs: Runs, cells: Iterable[Any]) -> str:
    """Valid answers of every cell in every way of decoding that needs no revision."""
    header = ["cell", "steps", f"at {SPEED:g} tokens per forward", *map(str, THRESHOLDS)]
    header += [f"{number} a step" for number in TOKENS_PER_STEP]
    rows = []
    for name in (cell.name for cell in cells if cell.name in runs and cell.stages):
        group = runs[name]
        row = [name, group[0]["steps"], shown(map(at_speed, group))]
        for threshold in THRESHOLDS:
            speed = [of_score(run, "tokens_per_forward", threshold=threshold) for run in group]
            valid = shown(of_score(run, "valid", threshold=threshold) for run in group)
            row.append(f"{valid} at {statistics.fmean(filter(None, speed)):.2f}" if any(speed) else "-")
        for number in TOKENS_PER_STEP:
            row.append(shown(of_score(run, "valid", tokens_per_step=number) for run in group))
        rows.append(row)
    return (
        "Percent of valid answers: at a speed (the primary measure), at thresholds with their tokens per forward, and "
        "at fixed numbers of tokens a step. Several seeds: mean (each).\n\n" + table(header, rows)
    )


def other_table(runs: Runs, cells: Iterable[Any]) -> str:
    """What else tells cells apart."""
    at = {"threshold": THRESHOLD}
    header = ["cell", "right", "F1", "held-out cross entropy", "right context"]
    rows = []
    for name in (cell.name for cell in cells if cell.name in runs):
        group = runs[name]
        settings = at if group[0]["stages"] else {}
        figures = [shown(of_score(run, part, **settings) for run in group) for part in ("right", "f1")]
        probes = [shown((run.get(part) for run in group), 3) for part in ("cross_entropy", "right_context")]
        rows.append([name, *figures, *probes])
    return (
        f"Right answers and F1 in percent at threshold {THRESHOLD}, the parent's by its own greedy decoding. Cross "
        "entropy in nats under mask noise that is the same for all of one block size. Right context: the mean "
        "probability of the true first four tokens of a phrase when the last three, which tell its form, and all else "
        "are visible.\n\n" + table(header, rows)
    )


def revision_table(group: Sequence[Run]) -> str:
    """Ways of revision of the model that was trained on its own drafts, at equal forwards."""
    if not group:
        return ""
    rows = []
    for revision in REVISIONS:
        at = {"threshold": THRESHOLD, "revision": revision}
        figures = [[of_score(run, name, **at) for run in group] for name in ("valid", "tokens_per_forward")]
        points = [shown(at_speed(run, revision, speed) for run in group) for speed in (SPEED, 2 * SPEED)]
        gain = revision_gain(group, revision) if revision else "-"
        rows.append([revision or "none", *points, shown(figures[0]), shown(figures[1], 2), gain])
    header = ["revision", *(f"at {speed:g} tokens per forward" for speed in (SPEED, 2 * SPEED))]
    header += [f"at {THRESHOLD}", "tokens per forward there", "gain there over none"]
    return f"### Revision\n\nThe cell `on-policy`.\n\n{table(header, rows)}"


def revision_gain(group: Sequence[Run], revision: str) -> str:
    """What a way of revision gives beside none, at one threshold."""
    with_it, without = (partial(of_score, threshold=THRESHOLD, revision=each) for each in (revision, None))
    p = chance_of([(with_it(run, "is_valid"), without(run, "is_valid")) for run in group])
    return gain_of(group, group, partial(with_it, name="valid"), partial(without, name="valid"), p)


def missing(scales: dict[str, Runs]) -> str:
    """Which cells have not been run, and with which seeds."""
    lines = []
    for name, cells in {**FREE, "fixed": FIXED_CELLS}.items():
        runs = scales.get(name, {})
        seeds = {run["seed"] for group in runs.values() for run in group}
        gaps = []
        for cell in cells:
            lacking = sorted(seeds - {run["seed"] for run in runs.get(cell.name, [])})
            if cell.name not in runs:
                gaps.append(f"`{cell.name}`")
            elif lacking and name in FREE and cell.name not in ("parent", "anchor"):
                gaps.append(f"`{cell.name}` with seed {', '.join(map(str, lacking))}")
            for run in runs.get(cell.name, []):
                if len(run["scores"]) < len(cell.decodings):
                    gaps.append(f"some ways of decoding `{cell.name}` with seed {run['seed']}")
        if gaps and (runs or name in ("pilot", "larger")):
            lines.append(f"- `{name}`: {', '.join(gaps)}" if runs else f"- `{name}`: all of it")
    return "## Not run yet\n\n" + "\n".join(lines) if lines else ""


# --- Claims -----------------------------------------------------------------------------------------------------------


def claims(runs: Runs) -> str:
    """What the figures say of each claim whose cells have been run."""
    rows = [
        [claim, *(verdict(runs[better], runs[worse], settings) for settings in MEASURES.values())]
        for claim, (better, worse) in CLAIMS.items()
        if better in runs and worse in runs
    ]
    told = (
        "Gains in points of valid answers. A claim is decided where the t interval leaves out 0; with one seed, where "
        "McNemar's p is below 0.05, which tells of the answers and not of the training."
    )
    return f"### Claims\n\n{told}\n\n{table(['claim', *MEASURES], rows)}" if rows else ""


def verdict(better: Sequence[Run], worse: Sequence[Run], settings: Settings | None) -> str:
    """The gain in valid answers of one cell over another, at a speed or by some settings of decoding."""
    if settings is None:
        return gain_of(better, worse, at_speed, at_speed)
    valid, answers = (lambda run, name=name: of_score(run, name, **settings) for name in ("valid", "is_valid"))
    others = {run["seed"]: answers(run) for run in worse}
    p = chance_of([(answers(run), others[run["seed"]]) for run in better if run["seed"] in others])
    return gain_of(better, worse, valid, valid, p)


def gain_of(
    better: Sequence[Run],
    worse: Sequence[Run],
    measure: Callable[[Run], float | None],
    other_measure: Callable[[Run], float | None],
    p: float | None = None,
) -> str:
    """The gain of one measure over another, paired by seed, and what follows; p is that of single answers."""
    others = {run["seed"]: other_measure(run) for run in worse}
    pairs = [(measure(run), others.get(run["seed"])) for run in better]
    gains = [first - second for first, second in pairs if first is not None and second is not None]
    if not gains:
        return "-"
    gain, error = statistics.fmean(gains), half_interval(gains)
    bound = error if error is not None else 0.0 if p is not None and p < 0.05 else math.inf
    told = "yes" if gain > bound else "no" if gain < -bound else "undecided"
    spread = "" if error is None else f" ± {error:.1f}"
    chance = "" if p is None else f", p {p:.2g}" if p >= 0.001 else ", p < 0.001"
    return f"**{told}**: {gain:+.1f}{spread}{chance}"


def half_interval(gains: Sequence[float]) -> float | None:
    """Half the width of the 95 % t interval of a mean; None for one value."""
    if len(gains) < 2:
        return None
    return T_95[min(len(gains) - 2, len(T_95) - 1)] * statistics.stdev(gains) / math.sqrt(len(gains))


def chance_of(pairs: Sequence[Sequence[str | None]]) -> float | None:
    """McNemar's p over the seeds whose answers of both models are known, which are those that a gain is of."""
    known = [pair for pair in pairs if all(pair)]
    return mcnemar(known) if known else None


def mcnemar(pairs: Sequence[Sequence[str | None]]) -> float | None:
    """Two-sided exact p of two models' answers, a digit for each answer; None where single answers are not known.

    Only the answers count that one of both has right: they fall to either alike if the models are equally good.
    """
    if not all(first and second for first, second in pairs):
        return None
    digits = [both for first, second in pairs for both in zip(first or "", second or "", strict=True)]
    wins, losses = digits.count(("1", "0")), digits.count(("0", "1"))
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


# --- Captions of one form ---------------------------------------------------------------------------------------------


def fixed_section(runs: Runs) -> str:
    """The claims that captions of one form decide, which are easy for parallel decoding."""
    every = [run for group in runs.values() for run in group]
    answers, length = every[0]["answers"], every[0]["answer_length"]
    lines = [speed_claim(runs)]
    for claim, sides in FIXED_CLAIMS.items():
        if all(name in runs for name, _ in sides):
            better, worse = (runs[name] for name, _ in sides)
            first, second = (partial(of_score, name="exact", threshold=THRESHOLD, revision=way) for _, way in sides)
            lines.append(f"{claim}: {gain_of(better, worse, first, second)} points.")
    rows = []
    for name in (cell.name for cell in FIXED_CELLS if cell.name in runs):
        for score in runs[name][0]["scores"]:
            settings = {part: score.get(part) for part in ("threshold", "revision")}
            group = runs[name]
            exact, speed = (
                [of_score(run, part, **settings) for run in group] for part in ("exact", "tokens_per_forward")
            )
            way = [score["threshold"] or "-", score["revision"] or "none"]
            rows.append([name, group[0]["steps"], *way, shown(exact), shown(speed, 2)])
    header = ["cell", "steps", "threshold", "revision", "exact", "tokens per forward"]
    return (
        f"## Captions of one form\n\nScale `fixed`: {answers} answers, captions and answers to questions, {length} "
        "tokens on average; exact ones are right in every token. The parent had 1,500 steps.\n\n"
        + "\n".join(f"- {line}" for line in lines)
        + "\n\n"
        + table(header, rows)
    )


def speed_claim(runs: Runs) -> str:
    """Whether some cell writes as many tokens per forward as claimed at block size 1's accuracy."""
    claim = f"At least {SPEED:g} tokens per forward within {MARGIN:g} points of block size 1"
    if "block-1" not in runs:
        return f"{claim}: not run yet."
    reference = statistics.fmean(of_score(run, "exact", threshold=THRESHOLD) or 0.0 for run in runs["block-1"])
    points = [
        (*point, name)
        for name, group in runs.items()
        if name != "block-1"
        for run in group
        for point in curve(run, "exact")
    ]
    equal = [point for point in points if point[1] >= reference - MARGIN]
    if not equal:
        return f"{claim}: **no**; no cell comes within {MARGIN:g} points of its {reference:.1f} percent."
    speed, exact, name = max(equal)
    told = "yes" if speed >= SPEED else "no"
    return (
        f"{claim}: **{told}**; `{name}` ({runs[name][0]['steps']:,} steps) writes {speed:.2f} with {exact:.1f} percent "
        f"exact, block size 1 ({runs['block-1'][0]['steps']:,} steps) has {reference:.1f}."
    )


# --- Plot -------------------------------------------------------------------------------------------------------------


def whole_curves(group: Sequence[Run]) -> list[list[tuple[float, float]]]:
    """The curves of the seeds that were measured at most thresholds; one that is being measured has fewer."""
    curves = [curve(run) for run in group]
    return [each for each in curves if len(each) == max(map(len, curves))]


def plot_trade_off(runs: Runs, path: Path) -> Path | None:
    """Valid answers against tokens per forward, means over seeds, a line over thresholds for each cell."""
    lines = {name: whole_curves(group) for name, group in runs.items() if name in COLOURS}
    lines = {name: curves for name, curves in lines.items() if len(curves[0]) > 1}
    if not lines:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for name, curves in lines.items():
        points = [[statistics.fmean(each) for each in zip(*same, strict=True)] for same in zip(*curves, strict=True)]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[name], label=name)
    axes.axvline(SPEED, color="#bbbbbb", linewidth=1)
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("valid answers (%)")
    axes.set_title("Valid answers against speed, over thresholds")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    chart.savefig(path, dpi=120)
    pyplot.close(chart)
    return path
