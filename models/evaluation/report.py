"""report.html: the scores, figures and cases of an evaluation on one page that opens from disk and can be mailed."""

from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path
from statistics import fmean

from matplotlib.colors import to_hex

from models.brats import LABEL_NAMES, LABELS, REGIONS
from models.evaluation.page import Html, figure, join, page, start, table, tag
from models.evaluation.statistics import mean_region_dice, note_on_few_cases
from models.files import write_atomically
from models.plots import CONVENTION, LABEL_COLORS

STANDARDS = {"lesion2026": "BraTS 2026 (brats-evaluation 0.0.10, gli)", "lesion2023": "BraTS 2023"}
SPACES = {"native": "native space, the grid of the original files", "network": "network space, the grid of the network"}
MEASURES = {
    "dice": "Dice", "ceiling_dice": "ceiling of Dice", "hd95_mm": "HD95, mm", "nsd_1mm": "NSD at 1 mm",
    "nsd_0mm": "NSD at 0 mm", "predicted_ml": "predicted, ml", "true_ml": "true, ml",
    "volume_error_ml": "volume error, ml",
}  # fmt: skip
LESION_MEASURES = {
    "dice": "lesion Dice", "nsd": "lesion NSD", "hd95_mm": "lesion HD95, mm", "tp": "lesions found",
    "fp": "lesions invented", "fn": "lesions missed",
}  # fmt: skip
# What the tables show, of what per_case.csv has: means of runs; of the regions of all cases; of all targets of a case.
OF_RUNS = ("dice", "ceiling_dice", "hd95_mm", "nsd_1mm", "lesion2026_dice", "lesion2023_dice")
OF_CASES = ("dice", "hd95_mm", "lesion2026_dice")
OF_A_CASE = ("dice", "ceiling_dice", "sensitivity", "precision", "hd95_mm", "nsd_1mm", "predicted_ml", "true_ml",
             "lesion2026_dice", "lesion2026_tp", "lesion2026_fp", "lesion2026_fn", "lesion2023_dice")  # fmt: skip
MANY_CASES = 50  # whose pictures a browser need not draw all at once


def write_report(
    path: Path,
    rows: list[dict],
    summary: dict,
    comparisons: list[dict],
    figures: dict[str, Path],
    sheets: dict[str, Path],
    panels: dict[str, dict[str, bytes]],
    facts: dict[str, str],
):
    """Write the page to `path`.

    Args:
        rows: of per_case.csv; none where no case has a truth.
        summary: `statistics.summarise(rows)`.
        comparisons: `statistics.compare_runs(rows)`.
        figures: caption -> file, as `score_plots.draw_scores` returns them.
        sheets: run -> file, as `score_plots.draw_sheets` returns them.
        panels: run -> case -> JPEG of `panels.case_panel`.
        facts: what else a reader should know of what was scored, such as {"Mirror images": "none"}.
    """
    runs = list(dict.fromkeys([row["run"] for row in rows] + [*panels]))
    cases = _ranked_cases(rows, panels)
    sections = {}
    if summary:
        sections["Scores"] = _scores(summary)
    if comparisons:
        sections["Comparisons"] = _comparisons(comparisons)
    if figures:
        sections["Figures"] = (figure(file.read_bytes(), caption, "wide") for caption, file in figures.items())
    sections["Runs"] = (_run(run, summary.get(run, {}), sheets.get(run)) for run in runs)
    sections["Cases"] = _cases(rows, cases, panels)
    title = f"Segmentation scores: {', '.join(runs)}"
    swatches = (f".{name} {{ background: {to_hex(LABEL_COLORS[value])}; }}\n" for value, name in LABELS.items())
    header = tag("header", tag("h1", title), _facts(rows, runs, len(cases), facts))
    write_atomically(path, page(title, _body(header, sections), "".join(swatches)))


def _body(header: Html, sections: dict[str, Iterable[Html]]) -> Iterator[Html]:
    """The parts of the page, one after the other: a thousand cases are more than should be in memory."""
    yield header
    yield tag("nav", *(tag("a", name, href=f"#{name.lower()}") for name in sections), aria_label="sections")
    yield start("main")
    for name, parts in sections.items():
        yield start("section", id=name.lower())
        yield tag("h2", name)
        yield from parts
        yield Html("</section>")
    yield Html("</main>")


# ---- words and numbers ---------------------------------------------------------------------------------------------


def _label(measure: str) -> str:
    """What a column of per_case.csv is called here; a lesion-wise one with its standard."""
    standard, _, kind = measure.partition("_")
    if standard in STANDARDS:
        return f"BraTS {standard.removeprefix('lesion')} {LESION_MEASURES[kind]}"
    return MEASURES.get(measure, measure)


def _number(value: float | None, measure: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, Integral):
        return str(value)
    return f"{value:.2f}" if measure.endswith(("_mm", "_ml")) else f"{value:.3f}"


def _interval(interval: list[float] | None, measure: str) -> str:
    return "–" if interval is None else f"[{_number(interval[0], measure)}, {_number(interval[1], measure)}]"


def _score(row: dict, measure: str) -> str:
    """A value of a case, with a star where an empty mask decided it."""
    star = "*" if row["empty"] and measure in ("dice", "hd95_mm") else ""
    return _number(row[measure], measure) + star


def _ranked_cases(rows: list[dict], panels: dict) -> list[str]:
    """The lowest Dice in the mean over runs first; then, by name, the cases without a truth."""
    dice = {}
    for of_cases in mean_region_dice(rows).values():
        for case, value in of_cases.items():
            dice.setdefault(case, []).append(value)
    without = {case for of_cases in panels.values() for case in of_cases} - dice.keys()
    return sorted(dice, key=lambda case: (fmean(dice[case]), case)) + sorted(without)


# ---- sections ------------------------------------------------------------------------------------------------------


def _facts(rows: list[dict], runs: list[str], cases: int, facts: dict[str, str]) -> Html:
    """What was scored, and what a reader must know before the first number."""
    said = {"Runs": ", ".join(runs), "Cases": str(cases)} | facts
    if rows:
        said["Space"] = SPACES[rows[0]["space"]]
        said["Lesion-wise scores"] = " and ".join(STANDARDS.values())
        said["Empty masks"] = _rules([row["empty"] for row in rows])
    said = (tag("dt", name) + tag("dd", text) for name, text in said.items())
    return join([
        tag("dl", join(said)),
        *_warnings(rows, runs),
        tag("p", f"Slices are axial, those with most tumour, in {CONVENTION}. Spread is the standard deviation of the "
                 "probability of tumour over mirror images and networks."),
        tag("ul", *(tag("li", tag("span", class_=f"swatch {name}"), f"{name}, {meaning}")
                    for name, meaning in LABEL_NAMES.items()), class_="legend"),
    ])  # fmt: skip


def _warnings(rows: list[dict], runs: list[str]) -> list[Html]:
    """Which runs are scored on patients that they were trained on."""
    said = []
    for run in runs:
        seen = {row["case"] for row in rows if row["run"] == run and row["trained_on"]}
        if seen:
            text = f"{run} was trained on {len(seen)} of these cases. Its scores there say nothing about new patients."
            said.append(tag("p", text, class_="warning"))
    return said


def _rules(empty: list[str]) -> str:
    """How often an empty mask decided a score."""
    both, prediction, truth = (empty.count(kind) for kind in ("both", "prediction", "truth"))
    return (f"a rule decided {both + prediction + truth} of {len(empty)} scores (marked *). Both masks empty: {both} "
            f"(Dice 1, 0 mm); only the prediction empty: {prediction}, only the truth: {truth} (Dice 0, 374 mm)")


def _scores(summary: dict) -> Iterator[Html]:
    """Means with their intervals: a table per space, a row per run and target."""
    for space in dict.fromkeys(space for spaces in summary.values() for space in spaces):
        targets = [(run, target, said) for run, spaces in summary.items()
                   for target, said in spaces.get(space, {}).items()]  # fmt: skip
        measures = [measure for measure in OF_RUNS if any(measure in said for *_, said in targets)]
        rows = []
        for *names, said in targets:
            means = (_mean(said[measure], measure) if measure in said else "–" for measure in measures)
            rows.append([*names, *means, *map(str, said["empty"].values()), str(said["cases"])])
        columns = ["run", "target", *map(_label, measures), "both empty", "prediction empty", "truth empty", "cases"]
        yield table(f"Mean and its 95 % bootstrap interval in {SPACES[space]}", columns, rows, names=2)


def _mean(said: dict, measure: str) -> Html:
    mean = tag("span", _number(said["mean"], measure))
    return join([mean, " ", tag("small", _interval(said["interval"], measure))]) if said["interval"] else mean


def _comparisons(comparisons: list[dict]) -> Iterator[Html]:
    note = ("Paired over cases. Wilcoxon: the two-sided signed-rank test; Holm: its p-value corrected for all targets "
            "and runs of a space and measure.")  # fmt: skip
    rows = []
    for row in comparisons:
        measure, difference = row["measure"], row["mean_difference"]
        rows.append([
            row["second"], row["first"], row["space"], row["target"], _label(measure),
            "+" * (difference > 0) + _number(difference, measure), _interval(row["interval"], measure),
            f"{row['wilcoxon_p']:.2g}", f"{row['holm_p']:.2g}", str(row["cases"]),
        ])  # fmt: skip
    columns = ["run", "compared with", "space", "target", "measure", "mean difference", "95 % interval", "Wilcoxon p",
               "Holm p", "cases"]  # fmt: skip
    yield tag("p", f"{note} {note_on_few_cases(comparisons)}".rstrip())
    yield table("Differences between runs", columns, rows, names=5)


def _run(run: str, spaces: dict, sheet: Path | None) -> Html:
    """The contact sheet of a run, and all statistics of its scores."""
    parts = [tag("h3", run)]
    for space, of_targets in spaces.items():
        rows = [
            [target, _label(measure), _number(said["mean"], measure), _interval(said["interval"], measure),
             *(_number(said[key], measure) for key in ("median", "q1", "q3", "sd", "min", "max")), str(said["n"])]
            for target, measures in of_targets.items() for measure, said in measures.items()
            if measure not in ("cases", "empty")
        ]  # fmt: skip
        columns = ["target", "measure", "mean", "95 % interval", "median", "lower quartile", "upper quartile", "sd",
                   "min", "max", "cases"]  # fmt: skip
        shown = table(f"{run} in {SPACES[space]}", columns, rows, names=2)
        parts.append(tag("details", tag("summary", f"All measures in {space} space"), shown))
    if sheet:
        parts.append(figure(sheet.read_bytes(), f"Contact sheet of {run}", "wide"))
    return join(parts)


def _cases(rows: list[dict], cases: list[str], panels: dict) -> Iterator[Html]:
    """A table of all cases, and an article for each of them."""
    of_cases = {case: {} for case in cases}  # case -> run -> target -> row
    for row in rows:
        of_cases[row["case"]].setdefault(row["run"], {})[row["target"]] = row
    links = {case: tag("a", case, href=f"#case-{number}") for number, case in enumerate(cases, start=1)}
    measures = OF_CASES if rows else ()
    columns = ["case", "run", *(f"{_label(measure)} {region}" for measure in measures for region in REGIONS)]
    overview = []
    for case, by_run in of_cases.items():
        for run, by_target in by_run.items():
            scores = (_score(by_target[region], measure) for measure in measures for region in REGIONS)
            overview.append([links[case], _named(run, by_target), *scores])
        if not by_run:
            overview.append([links[case], "no truth", *["–"] * (len(columns) - 2)])
    yield table("All cases, the lowest Dice first", columns, overview, names=2)
    for number, (case, by_run) in enumerate(of_cases.items(), start=1):
        yield _case(number, case, by_run, panels, lazy=len(cases) > MANY_CASES)


def _named(run: str, by_target: dict) -> str:
    return f"{run} (trained on this patient)" if next(iter(by_target.values()))["trained_on"] else run


def _case(number: int, case: str, by_run: dict, panels: dict, lazy: bool) -> Html:
    """The pictures and scores of a case under every run."""
    pictures = (figure(of_cases[case], run, lazy=lazy) for run, of_cases in panels.items() if case in of_cases)
    parts = [tag("h3", case), tag("div", *pictures, class_="panels")]
    rows = []
    for run, by_target in by_run.items():
        for target, row in by_target.items():
            rows.append([_named(run, by_target), target, *(_score(row, measure) for measure in OF_A_CASE)])
    if rows:
        columns = ["run", "target", *map(_label, OF_A_CASE)]
        parts.append(table(f"{case} in {row['space']} space", columns, rows, names=2, sort=False))
    return tag("article", *parts, id=f"case-{number}")
