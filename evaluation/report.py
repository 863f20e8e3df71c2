"""Tables and plots of the study, from the JSON files of its cells alone."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .cells import CELLS, SIZES

Run = dict[str, Any]
Score = dict[str, Any]
THRESHOLD = 0.9  # of the tables that show one
WAYS = {
    "direct": "direct",
    "warm": "warm (PBM)",
    "ar-distilled": "warm + AR distillation",
    "swd": "warm + SWD",
}
FINDINGS = Path(__file__).with_name("findings.md")  # what a reader sees in the full study's figures
BUDGETS = ("long-", "")  # prefixes of names
MARGIN = 2.0  # points below block size 1 that count as equal
SPEED = 3.0  # tokens per forward claimed at equal accuracy
CONTROLS = {
    "Cross entropy or distillation, equal steps": ("warm-32", "swd-32", "swd+ce-32"),
    "The teacher: an anchor of one unit, of ten units, a larger one; and what the anchors themselves reach": (
        *("swd-32", "swd-long-anchor-32", "large-teacher-32", "anchor-4", "long-anchor-4"),
    ),
    "A larger budget": ("long-direct-32", "long-warm-32", "long-swd-32"),
    "The reference's mask (clean tokens see noisy ones) or the right one": ("faulty-mask-8", "right-mask-8"),
    "The autoregressive parent, as it is and trained on": ("parent", "ar-continued"),
}
NOISES = ("mask-noise-8", "uniform-noise-8", "mixed-noise-8", "mixed-noise-visible-8")
COLOURS = {
    "direct": "#b0413e",
    "warm": "#e0a030",
    "ar-distilled": "#7a8ca0",
    "swd": "#1f6f8b",
    "anchor": "#5a8f3c",
    "block-1": "#303030",
}


def read_runs(results: Path) -> dict[str, list[Run]]:
    """Finished runs by the name of their cell, one for each seed."""
    runs: dict[str, list[Run]] = defaultdict(list)
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
    """Write `SMALL_STUDY.md` and its plots into a folder; returns the path of the text."""
    runs = read_runs(results)
    folder = output / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    plots = [plot_block_sizes(runs, folder / "block_sizes.png"), plot_trade_off(runs, folder / "trade_off.png")]
    sections = [
        heading(runs),
        claims(runs),
        FINDINGS.read_text("utf-8").strip() if output == FINDINGS.parent else "",
        "## By block size\n\n" + block_size_table(runs),
        "\n".join(f"![{path.stem.replace('_', ' ')}](plots/{path.name})" for path in plots if path),
        "## Over thresholds\n\n" + threshold_table(runs),
        "## Controls\n\n" + "\n\n".join(control_table(runs, *control) for control in CONTROLS.items()),
        "## Noise and revision\n\n" + noise_table(runs),
        missing(runs),
    ]
    path = output / "SMALL_STUDY.md"
    path.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return path


def heading(runs: dict[str, list[Run]]) -> str:
    """The models and the data of the measurements."""
    every = [run for group in runs.values() for run in group]
    if not every:
        return "# The small-scale study\n\nNo cell has been run yet."
    first = every[0]
    seeds = sorted({run["seed"] for run in every})
    return f"""# The small-scale study

Every figure below comes from the JSON files in `results/`; `python -m bard_vl.evaluation.small_study --report` writes
this page again. Exact answers: percent of {first["answers"]} answers about scenes that no training has seen, half of
them captions and half answers to questions, {first["answer_length"]} tokens on average with the end of sequence, that
are right in every token. Tokens per forward count every forward, the prompt's included. A step has
{first["batch_size"]} samples. Seeds: {", ".join(map(str, seeds))}; with several, the range stands in brackets."""


def score_at(run: Run, threshold: float | None = THRESHOLD, revision: str | None = None) -> Score | None:
    """The run's score at a threshold, or its only one."""
    scores = [s for s in run["scores"] if s["threshold"] in (threshold, None) and s["revision"] == revision]
    return scores[0] if scores else None


def figure(runs: Sequence[Run], name: str, threshold: float = THRESHOLD, revision: str | None = None) -> str:
    """Mean over seeds of one figure, with the range where there are several."""
    values = [score[name] for run in runs if (score := score_at(run, threshold, revision))]
    if not values:
        return ""
    text = f"{mean(values):.{2 if name == 'tokens_per_forward' else 1}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f}-{max(values):.1f})"


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table; the first column is text, the others are numbers."""
    names = list(header)
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def block_size_table(runs: dict[str, list[Run]]) -> str:
    """Exact answers and tokens per forward of every way to every block size."""
    header = ["block size", "steps", *WAYS.values()]
    rows = []
    for size in SIZES:
        cells = [runs.get(f"{way}-{size}", []) for way in WAYS]
        steps = next((group[0]["steps"] for group in cells if group), "")
        shown = [f"{figure(g, 'exact')} at {figure(g, 'tokens_per_forward')}" if g else "not run" for g in cells]
        rows.append([size, steps, *shown])
    single = runs.get("block-1")
    if single:
        rows.insert(0, [1, single[0]["steps"], f"{figure(single, 'exact')} at 1.00", "", "", ""])
    return f"Exact answers at tokens per forward, threshold {THRESHOLD}.\n\n" + table(header, rows)


def threshold_table(runs: dict[str, list[Run]]) -> str:
    """Accuracy against tokens per forward for the cells that were decoded at several thresholds."""
    chosen = {name: group for name, group in runs.items() if len(thresholds(group)) > 1}
    if not chosen:
        return "Not run yet."
    columns = sorted({threshold for group in chosen.values() for threshold in thresholds(group)})
    rows = []
    for name in (cell.name for cell in CELLS if cell.name in chosen):
        group = chosen[name]
        shown = [f"{figure(group, 'exact', t)} at {figure(group, 'tokens_per_forward', t)}" for t in columns]
        rows.append([name, *shown])
    return "Exact answers at tokens per forward.\n\n" + table(["cell", *map(str, columns)], rows)


def thresholds(group: Sequence[Run]) -> list[float]:
    """Thresholds that a cell was decoded at without revision."""
    scores = [score for score in group[0]["scores"] if score["revision"] is None] if group else []
    return [score["threshold"] for score in scores if score["threshold"] is not None]


def control_table(runs: dict[str, list[Run]], title: str, names: Sequence[str]) -> str:
    """Cells that differ in one thing."""
    header = ["cell", "steps", "exact", "captions", "questions", "tokens per forward", "last training loss"]
    rows = []
    for name in names:
        group = runs.get(name)
        if not group:
            rows.append([name, *["not run"] * (len(header) - 1)])
            continue
        losses = [run["stages"][-1]["loss"] for run in group if run["stages"]]
        numbers = [figure(group, part) for part in ("exact", "captions", "questions", "tokens_per_forward")]
        rows.append([name, group[0]["steps"], *numbers, f"{mean(losses):.4f}" if losses else ""])
    return f"### {title}\n\n" + table(header, rows)


def noise_table(runs: dict[str, list[Run]]) -> str:
    """Kinds of noise in training, ways of revision in decoding."""
    rows = []
    for name in NOISES:
        for revision in (None, "overwrite", "remask"):
            group = runs.get(name, [])
            numbers = [figure(group, part, revision=revision) for part in ("exact", "tokens_per_forward")]
            rows.append([name, revision or "none", *(numbers if group else ["not run"] * 2)])
    return table(["cell", "revision", "exact", "tokens per forward"], rows)


def missing(runs: dict[str, list[Run]]) -> str:
    """The names of the cells that have not been run."""
    names = [cell.name for cell in CELLS if cell.name not in runs]
    return "## Not run yet\n\n" + ", ".join(f"`{name}`" for name in names) if names else ""


# --- Claims -----------------------------------------------------------------------------------------------------------


def claims(runs: dict[str, list[Run]]) -> str:
    """A verdict by the figures on each claim of the method."""
    verdicts = [
        *(
            compare(runs, f"warm-{size}", f"direct-{size}", f"At block {size}, merging beats direct training")
            for size in SIZES[1:]
        ),
        compare(runs, "long-warm-32", "long-direct-32", "At block 32 with the larger budget"),
        compare(runs, "swd-32", "warm-32", "Distillation from the anchor adds to merging"),
        compare(runs, "long-swd-32", "long-warm-32", "The same with the larger budget and a well-trained anchor"),
        compare(runs, "ar-distilled-32", "warm-32", "Distillation from the autoregressive parent adds to merging"),
        *(
            compare(runs, "mask-noise-8", f"{kind}-noise-8", f"For plain decoding mask noise beats {kind} noise")
            for kind in ("mixed", "uniform")
        ),
        compare(runs, "right-mask-8", "faulty-mask-8", "The right mask beats the reference's"),
        speed_claim(runs),
    ]
    return "## Claims\n\n" + "\n".join(f"- {verdict}" for verdict in verdicts)


def compare(runs: dict[str, list[Run]], better: str, worse: str, claim: str) -> str:
    """One cell against another at the same threshold, paired by seed, with the error of a difference of shares."""
    if better not in runs or worse not in runs:
        return f"{claim}: not run yet."
    others = {run["seed"]: run for run in runs[worse]}
    pairs = [(run, others[run["seed"]]) for run in runs[better] if run["seed"] in others]
    scores = [(exact(first), exact(second)) for first, second in pairs]
    gains = [first - second for first, second in scores]
    if not gains:
        return f"{claim}: not run yet with a common seed."
    # The larger of what the choice of scenes and, with several seeds, what training makes uncertain.
    errors = [mean([standard_error(a, b, pairs[0][0]["answers"]) for a, b in scores])]
    errors += [statistics.stdev(gains)] if len(gains) > 1 else []
    gain, error = mean(gains), max(errors) / len(gains) ** 0.5
    verdict = "yes" if gain > 2 * error else "no" if gain < -2 * error else "undecided"
    values = " and ".join(f"{mean(column):.1f}" for column in zip(*scores, strict=True))
    seeds = f"{len(gains)} seed{'s' * (len(gains) > 1)}"
    return f"{claim}: **{verdict}**; {values} percent exact, {gain:+.1f} ± {error:.1f} points ({seeds})."


def exact(run: Run) -> float:
    """Percent of exact answers at the common threshold."""
    score = score_at(run)
    assert score is not None, f"{run['cell']} was not decoded at threshold {THRESHOLD}"
    return score["exact"]


def standard_error(first: float, second: float, count: int) -> float:
    """Of the difference of two percentages of `count` independent answers."""
    return (sum(p * (100 - p) for p in (first, second)) / count) ** 0.5


def speed_claim(runs: dict[str, list[Run]]) -> str:
    """Whether some cell writes as many tokens per forward as claimed at block size 1's accuracy."""
    claim = f"At least {SPEED:g} tokens per forward within {MARGIN:g} points of block size 1"
    if "block-1" not in runs:
        return f"{claim}: not run yet."
    reference = mean([exact(run) for run in runs["block-1"]])
    points = [(score, name) for name, group in runs.items() for score in trade_off(group) if name != "block-1"]
    equal = [point for point in points if point[0]["exact"] >= reference - MARGIN]
    if not equal:
        return f"{claim}: **no**; no cell comes within {MARGIN:g} points of its {reference:.1f} percent."
    best, name = max(equal, key=lambda point: point[0]["tokens_per_forward"])
    verdict = "yes" if best["tokens_per_forward"] >= SPEED else "no"
    return (
        f"{claim}: **{verdict}**; `{name}` ({runs[name][0]['steps']:,} steps) at threshold {best['threshold']} writes "
        f"{best['tokens_per_forward']:.2f} with {best['exact']:.1f} percent exact, block size 1 "
        f"({runs['block-1'][0]['steps']:,} steps) has {reference:.1f}."
    )


def trade_off(group: Sequence[Run]) -> list[Score]:
    """Mean exact answers and tokens per forward over seeds, for each threshold without revision."""
    points = []
    for threshold in thresholds(group):
        scores = [score for run in group if (score := score_at(run, threshold))]
        figures = {name: mean([score[name] for score in scores]) for name in ("exact", "tokens_per_forward")}
        points.append({"threshold": threshold, **figures})
    return points


# --- Plots ------------------------------------------------------------------------------------------------------------


def plot_block_sizes(runs: dict[str, list[Run]], path: Path) -> Path | None:
    """Exact answers over block sizes where several were measured; a line for each way, a bar for the range of seeds."""

    def draw(axes: Any) -> None:
        for way, label in WAYS.items():
            sizes = [size for size in SIZES if f"{way}-{size}" in runs]
            values = [[exact(run) for run in runs[f"{way}-{size}"]] for size in sizes]
            if sizes:
                means = [mean(each) for each in values]
                spread = [[mean(each) - min(each) for each in values], [max(each) - mean(each) for each in values]]
                axes.errorbar(sizes, means, yerr=spread, marker="o", capsize=3, color=COLOURS[way], label=label)
        if "block-1" in runs:
            reference = mean([exact(run) for run in runs["block-1"]])
            axes.axhline(reference, color=COLOURS["block-1"], linestyle=":", label="block size 1")
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, list(map(str, SIZES)))
        axes.set_xlabel("block size")
        axes.set_title("Exact answers by block size, equal steps for each size")

    measured = [size for size in SIZES if runs.keys() & {f"{way}-{size}" for way in WAYS}]
    return figure_file(path, draw, len(measured) > 1)


def plot_trade_off(runs: dict[str, list[Run]], path: Path) -> Path | None:
    """Exact answers against tokens per forward, a line over thresholds for each cell."""
    labels = {**WAYS, "anchor": "anchor"}
    named = {f"{prefix}{way}-{size}": way for prefix in BUDGETS for way in labels for size in (4, 16, 32)}
    names = [name for name in named if len(thresholds(runs.get(name, []))) > 1]

    def draw(axes: Any) -> None:
        for name in names:
            points = sorted(trade_off(runs[name]), key=lambda point: point["threshold"])
            steps = runs[name][0]["steps"]
            axes.plot(
                [point["tokens_per_forward"] for point in points],
                [point["exact"] for point in points],
                marker="o",
                markersize=4,
                linestyle="-" if name.startswith("long") else "--" if name.endswith("32") else ":",
                color=COLOURS[named[name]],
                label=f"{labels[named[name]]}, block {runs[name][0]['block_size']}, {steps:,} steps",
            )
        if "block-1" in runs:
            reference = mean([exact(run) for run in runs["block-1"]])
            axes.axhspan(reference - MARGIN, reference, color=COLOURS["block-1"], alpha=0.12, linewidth=0)
            axes.axhline(
                reference, color=COLOURS["block-1"], linestyle=":", label=f"block size 1, less {MARGIN:g} points"
            )
        axes.axvline(SPEED, color="#bbbbbb", linewidth=1)
        axes.set_xlabel("tokens per forward")
        axes.set_title("Exact answers against speed, thresholds 0.5 to 0.99")

    return figure_file(path, draw, bool(names))


def figure_file(path: Path, draw: Callable[[Any], None], wanted: bool) -> Path | None:
    """Draw one figure of percentages into a file; nothing where there is nothing to show."""
    if not wanted:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    draw(axes)
    axes.set_ylabel("exact answers (%)")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    chart.savefig(path, dpi=120)
    pyplot.close(chart)
    return path
