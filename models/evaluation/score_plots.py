"""The figures of an evaluation: the scores of all cases under every run. Knows rows and arrays; see
models/evaluation/statistics.py for what a row is."""

from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from models.brats import REGION_CHANNELS, REGIONS
from models.evaluation.panels import contact_sheets
from models.evaluation.statistics import BINS, calibration_error, mean_region_dice
from models.files import write_atomically
from models.plots import save_figure

# Okabe & Ito's colours, which colour-blind people can distinguish
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "os^Dv*X"
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # 100, not 10²
BOX_FROM = 5  # quartiles of fewer values say less than their dots


def draw_scores(rows: list[dict], counts: dict[str, np.ndarray], out: Path, title: str) -> dict[str, Path]:
    """The figures of all runs in the folder `out`; returns caption -> file, for the report.

    Args:
        rows: of per_case.csv.
        counts: run -> [3 regions, 3, BINS] of `statistics.reliability_counts`, added up over cases; may be empty.
        title: what was scored.
    """
    figures = {"Dice and HD95 of every case": out / "scores.png"}
    score_boxes(rows, out / "scores.png", title)
    figures["Dice over the true volume"] = out / "dice_over_volume.png"
    dice_over_volume(rows, out / "dice_over_volume.png", title)
    if counts:
        figures["Reliability of the probabilities"] = out / "reliability.png"
        reliability(counts, out / "reliability.png", f"{title}; probabilities in network space")
    return figures


def draw_sheets(rows: list[dict], panels: dict[str, dict[str, bytes]], out: Path) -> dict[str, Path]:
    """contact_sheet_<run>_1.jpg and so on in the folder `out`, of panels run -> case -> JPEG; returns run -> the first
    file, which has the worst cases."""
    dice = mean_region_dice(rows)
    for run, of_cases in panels.items():
        for number, sheet in enumerate(contact_sheets(of_cases, dice.get(run, {}), run), start=1):
            write_atomically(out / f"contact_sheet_{run}_{number}.jpg", sheet)
    return {run: out / f"contact_sheet_{run}_1.jpg" for run in panels}


def score_boxes(rows: list[dict], path, title: str):
    """Dice and HD95 of every case, with box and mean, for each run: a column of panels per region."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure = Figure(figsize=(max(9, 2.4 * len(runs)), 7.5))
    grid = figure.subplots(2, len(REGIONS), sharex=True, sharey="row")
    for column, region in enumerate(REGIONS):
        for axes, measure in zip(grid[:, column], ("dice", "hd95_mm"), strict=True):
            for place, run in enumerate(runs):
                chosen = [row for row in rows if (row["run"], row["target"]) == (run, region)]
                _strip_and_box(axes, place, chosen, measure)
            axes.grid(alpha=0.3, axis="y")
        grid[0, column].set_title(region)
    above, below = grid[:, 0]
    above.set(ylabel="Dice", ylim=(-0.03, 1.03), xlim=(-0.6, len(runs) - 0.4))
    below.set_yscale("symlog", linthresh=1)  # a missed region has 374 mm, a good one 1 or 2
    below.set(ylabel="HD95, mm", ylim=(-0.15, 500), yticks=[0, 1, 2, 5, 10, 20, 50, 100, 374])
    below.yaxis.set_major_formatter(PLAIN)
    below.yaxis.set_minor_locator(NullLocator())
    below.set_xticks([])
    key = "mark: a case, hollow where an empty mask decided; box: quartiles and median; diamond: mean"
    figure.suptitle(f"{title}\n{key}", fontsize=11)
    _save_with_legend(figure, runs, path)


def _strip_and_box(axes, place: int, rows: list[dict], measure: str):
    """The values of one run at `place` of the x axis: dots, a box over them and the mean."""
    if not rows:
        return
    values = np.array([row[measure] for row in rows], float)
    ruled = np.array([row["empty"] != "" for row in rows])
    across = place + np.random.default_rng(0).uniform(-0.25, 0.25, len(values)) * (len(values) > 1)
    look = {"ls": "none"} | _look(place) | _dot_size(len(values))
    axes.plot(across[~ruled], values[~ruled], mew=0, **look)
    axes.plot(across[ruled], values[ruled], mfc="none", **look)
    if len(values) >= BOX_FROM:
        axes.boxplot(values, positions=[place], widths=0.6, showfliers=False, manage_ticks=False,
                     medianprops={"color": "black", "lw": 2}, zorder=3)  # fmt: skip
    if len(values) > 1:
        axes.plot(place, values.mean(), "D", ms=6, color="white", mec="black", zorder=4)


def _save_with_legend(figure, runs: list[str], path):
    """Save a figure with the legend of the runs below it, where long names have room."""
    marks = [Line2D([], [], ls="none", label=run, **_look(place)) for place, run in enumerate(runs)]
    name_in = 0.7 + 0.09 * max(map(len, runs))  # with its mark
    columns = max(1, min(4, int(figure.get_figwidth() / name_in)))
    figure.legend(handles=marks, loc="lower center", ncols=columns, frameon=False)
    lines = -(-len(runs) // columns)
    save_figure(figure, path, rect=(0, (0.15 + 0.22 * lines) / figure.get_figheight(), 1, 1))


def _look(place: int) -> dict:
    """Colour and marker of the run in that place."""
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}


def _dot_size(count: int) -> dict:
    """Small and faint enough that `count` dots can be distinguished."""
    return {"ms": 5, "alpha": 0.7} if count <= 200 else {"ms": 3, "alpha": 0.35}


def dice_over_volume(rows: list[dict], path, title: str):
    """Dice of every case over the true volume (logarithmic, with a place for 0), a panel per region."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure = Figure(figsize=(13, 5))
    grid = figure.subplots(1, len(REGIONS), sharey=True)
    for axes, region in zip(grid, REGIONS, strict=True):
        for place, run in enumerate(runs):
            chosen = [row for row in rows if (row["run"], row["target"]) == (run, region)]
            points = [row["true_ml"] for row in chosen], [row["dice"] for row in chosen]
            axes.plot(*points, ls="none", mew=0, **_look(place), **_dot_size(len(chosen)))
        volumes = [row["true_ml"] for row in rows if row["target"] == region]
        positive = [volume for volume in volumes if volume > 0] or [1]
        low, high = 10 ** np.floor(np.log10(min(positive))), 10 ** np.ceil(np.log10(1.01 * max(positive)))
        axes.set_xscale("symlog", linthresh=low, subs=range(2, 10))
        axes.set(title=region, xlabel=f"true volume of {region}, ml", xlim=(low if min(volumes) else -low / 5, high))
        axes.xaxis.set_major_formatter(PLAIN)
        axes.grid(alpha=0.3)
    grid[0].set(ylabel="Dice of a case", ylim=(-0.03, 1.03))
    figure.suptitle(title)
    _save_with_legend(figure, runs, path)


def reliability(counts: dict[str, np.ndarray], path, title: str):
    """How often a voxel truly is in a region, over the probability that a run gave it, and below how many voxels: a
    column of panels a region. `counts` as for `draw_scores`."""
    figure = Figure(figsize=(13, 7))
    grid = figure.subplots(2, len(REGIONS), sharex=True, sharey="row", height_ratios=(3, 1))
    for (curve, histogram), region in zip(grid.T, REGIONS, strict=True):
        curve.plot((0, 1), (0, 1), color="#999999", ls=":")
        for place, of_regions in enumerate(counts.values()):
            count = of_regions[REGION_CHANNELS.index(region)]
            voxels, probability, true = count[:, count[0] > 0]
            errors = calibration_error(count), calibration_error(count[:, 1:])
            said = " / ".join("-" if error is None else f"{error:.2g}" for error in errors)
            curve.plot(probability / voxels, true / voxels, ms=5, label=f"ECE {said}", **_look(place))
            histogram.stairs(count[0], np.linspace(0, 1, BINS + 1), color=_look(place)["color"], lw=1.5)
        curve.set_title(region)
        curve.legend(fontsize=8, loc="upper left")
        curve.grid(alpha=0.3)
        histogram.grid(alpha=0.3)
        histogram.set(xlabel=f"probability of {region}", xlim=(-0.02, 1.02))
    grid[0, 0].set(ylabel="share of voxels that are in the region", ylim=(-0.02, 1.02))
    grid[1, 0].set(ylabel="voxels", yscale="log")
    key = f"ECE, the expected calibration error: of all voxels / of those with a probability above {1 / BINS:g}"
    figure.suptitle(f"{title}\n{key}", fontsize=11)
    _save_with_legend(figure, list(counts), path)


def paired_dice(scores: dict[str, dict[str, list[float]]], path, title: str, notes: dict[str, str]):
    """Dice of every case under each run, a line joining the same case: one panel per target.

    Args:
        scores: target -> run -> Dice of the cases, in one order.
        notes: target -> what stands below the panel's title.
    """
    many = len(next(iter(scores.values()))) > 3  # names at a low angle would run into each other
    figure = Figure(figsize=(4 * len(scores), 7 if many else 5))
    grid = figure.subplots(1, len(scores), sharey=True, squeeze=False)
    for axes, (target, by_run) in zip(grid[0], scores.items(), strict=True):
        places, dice = range(len(by_run)), np.array([*by_run.values()])  # [runs, cases]
        alpha = np.clip(40 / dice.shape[1], 0.05, 0.5)  # many cases are a cloud
        axes.plot(places, dice, color=COLORS[0], marker="o", ms=4, lw=1, alpha=alpha)
        axes.plot(places, dice.mean(1), color="black", marker="_", ms=30, mew=3, ls="none", label="mean")
        axes.set_xticks(places, by_run, rotation=60 if many else 20, ha="right", rotation_mode="anchor")
        axes.set(xlim=(-0.5, len(by_run) - 0.5), ylim=(-0.03, 1.03))
        axes.set_title(f"{target}\n{fill(notes[target], 24)}", fontsize=11)  # long names leave narrow panels
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("Dice; a line is a case")
    grid[0][0].legend(loc="lower left")
    figure.suptitle(title)
    save_figure(figure, path)
