"""The tables of RESULTS.md that say what changes of the training, beginnings and networks are worth in Dice."""

from statistics import fmean, median

import numpy as np
from table_cells import (
    NETWORKS,
    REGIONS,
    ROWS,
    SETS,
    TESTS,
    commit_of,
    folds_of,
    instruction_set,
    middle,
    over_seeds,
    read,
    seconds,
    source,
    table,
)

from models.evaluation.statistics import mean_interval
from tests.benchmarks import recipe

FOLDS = "-fold0/evaluation-cross-validation"
BEGINNINGS = (  # network; of each training: folder of an evaluation, name of the runs in it, what they were
    ("unet", (f"unet/results/baseline-real-96{FOLDS}", "baseline-real-96", "60 epochs, learning rate 1e-3"),
             (f"unet/results/real-96{FOLDS}", "real-96", "100 epochs"),
             (f"unet/results/phantoms-real-96{FOLDS}", ROWS["unet"], "60 epochs, from weights of phantoms"),
             ("unet/results/varied-96/evaluation-cases", "varied-96", "128 varied phantoms and no patient")),
    ("unet", (f"unet/results/baseline-real-128{FOLDS}", "baseline-real-128", "60 epochs at 128³, learning rate 1e-3"),
             (f"unet/results/phantoms-real-128{FOLDS}", "phantoms-real-128",
              "60 epochs at 128³, from weights of phantoms")),
    ("swinunetr", (f"unet/results/real-96{FOLDS}", "swinunetr-real-96", "`--no-v2`, 40 epochs"),
                  (f"unet/results/phantoms-real-96{FOLDS}", ROWS["swinunetr"],
                   "`--no-v2`, 40 epochs, from weights of phantoms"),
                  (f"swinunetr/results/heads-real-96{FOLDS}", "heads-real-96",
                   "V2, 20 epochs, `--init swinunetr-heads`")),
)  # fmt: skip

# Variants that the code no longer trains: the one whose flags they had, and what was different.
FORMER = {"baseline-regions-alone": ("baseline-regions", ", its loss without NCR and ED, as before `6c36448`")}


def networks() -> list[str]:
    """Swin UNETR against the U-Net in the cross-validation, each case's score first averaged over the seeds."""
    lines = []
    for target in (*REGIONS, "NCR", "ED"):
        unet, transformer = (folds_of(network, target, "dice").mean(0) for network in NETWORKS)
        low, high = mean_interval(transformer - unet)
        lines.append([target, f"{unet.mean():.3f}", f"{transformer.mean():.3f}",
                      f"{(transformer - unet).mean():+.3f} ({low:+.3f} to {high:+.3f})",
                      f"{(transformer > unet).sum()} of {len(unet)}"])  # fmt: skip
    return table("mean Dice over 3 seeds, U-Net, Swin UNETR, difference (95 % interval), better in", lines)


def beginnings() -> list[str]:
    """What the cross-validation owes to the learning rate and to weights from phantoms, in native space; differences
    are those to the line of "-" above."""
    lines = []
    for network, *trainings in BEGINNINGS:
        first = None
        for folder, name, what in trainings:
            path = f"models/{folder}/per_case.csv"  # scores of both networks can stand in the U-Net's folder
            rows = [{"case": row["case"], "target": row["target"], "dice_last": row["dice"],
                     "true_voxels": float(row["true_ml"]) > 0} for row in read(path, run=name)]  # fmt: skip
            first = first or rows
            compared = "-" if rows is first else change_of_labels(first, rows)
            link = source(path, [commit_of(f"models/{network}/results/{folder.split('/')[2]}")])
            cells = [f"{mean:.3f}" for mean in label_means(rows)]
            lines.append([f"{NETWORKS[network]}, {what}", *cells, compared, link])
    return table("network and training, labels, WT, TC, ET, difference of labels (95 % interval) and better in, source",
                 lines)  # fmt: skip


def islands() -> list[str]:
    """What `--islands` changes in the scores of the U-Net of the recipe of before, at 128³."""
    folder, lines = "models/unet/results/baseline-real-128-fold0", []
    paths = [f"{folder}/evaluation-{kind}/per_case.csv" for kind in ("cross-validation", "islands")]
    for target in (*REGIONS, "NCR", "ED"):
        cells = []
        for measure, digits in (("dice", 3), ("hd95_mm", 1), ("nsd_1mm", 3), ("lesion2026_dice", 3),
                                ("lesion2023_dice", 3)):  # fmt: skip
            values = [[float(row[measure]) for row in read(path, target=target) if row[measure]] for path in paths]
            cells.append(" to ".join(f"{fmean(one):.{digits}f}" for one in values) if values[0] else "-")
        lines.append([target, *cells, source(paths[1], [commit_of(folder)]) if not lines else ""])
    return table("mean of 12 cases, Dice, HD95 in mm, NSD at 1 mm, lesion Dice of 2026, lesion Dice of 2023, source",
                 lines)  # fmt: skip


def factors() -> list[str]:
    """What changes of the training are worth; the first line is the default. Differences are those at shared seeds."""
    path, (reference, *changed), lines = f"{TESTS}/recipe.csv", trainings_of_forty_epochs(), []
    for rows in (reference, *changed):
        lines.append([*variant_cells(rows, reference), f"{float(rows[0]['gmac']):.1f}", step_of(rows),
                      source(path, rows)])  # fmt: skip
    return table("U-Net, seeds, labels ± between seeds, WT, TC, ET, "
                 "difference of labels (95 % interval) and better in, GMAC, step, source", lines)  # fmt: skip


def worth() -> list[str]:
    """Of the factors those that two seeds or more and an interval above 0 speak for, the best first."""
    path, (reference, *changed), lines = f"{TESTS}/recipe.csv", trainings_of_forty_epochs(), {}
    for rows in changed:
        if rows[0]["variant"] in FORMER:
            continue
        seeds = {row["seed"] for row in rows}
        same_seeds = [row for row in reference if row["seed"] in seeds]
        (gain, *_), (low, _), *_ = recipe.difference(recipe.scores_of(same_seeds), recipe.scores_of(rows))
        if len(seeds) > 1 and low[0] > 0:
            name, of_seeds, *_, compared = variant_cells(rows, reference)
            step_ms, usual_ms = ([float(row["step_ms"]) for row in timed(each)] for each in (rows, reference))
            times = f"{median(step_ms) / median(usual_ms):.1f}" if step_ms else "-"
            change = name.removeprefix("U-Net").lstrip(" ,")
            lines[gain] = [change, of_seeds, compared, times, source(path, rows)]
    return table("change, seeds, change of the labels' Dice (95 % interval) and better in, times the step, source",
                 [lines[gain] for gain in sorted(lines, reverse=True)])  # fmt: skip


def trainings_of_forty_epochs() -> list[list[dict]]:
    """Rows of recipe.csv: of the default U-Net, and then of each change of it."""
    variants = variants_of("40")
    reference = variants.pop(("baseline", "real64cv"))
    return [reference, *(rows for (_, data), rows in variants.items() if data in ("real64cv", "real64z"))]


def heads() -> list[str]:
    """A training on nine patients after usual and after varied synthetic heads."""
    return variants_on("real64", "40 epochs on 9 patients after",
                       {"baseline-phantoms": "64 usual heads", "baseline-varied": "64 varied heads"})  # fmt: skip


def hospitals() -> list[str]:
    """Trainings that are scored on patients of hospitals that they have no patient of."""
    names = {"baseline": "default", "baseline-strong": "`--augmentation strong`",
             "baseline-phantoms": "`--init`, from 64 synthetic heads",
             "baseline-heads": "`--init unet-heads`"}  # fmt: skip
    return variants_on("real64site", "40 epochs on 8 patients", names)


def short() -> list[str]:
    """A training of half as many epochs as those of the factors, from random weights and from the project's."""
    names = {"baseline": "default", "baseline-heads": "`--init unet-heads`"}
    return variants_on("real64cv", "20 epochs on 9 patients", names, epochs="20")


def variants_on(data: str, what: str, names: dict[str, str], epochs: str = "40") -> list[str]:
    """A line for each variant of a data set; differences are those to the first."""
    path, variants, lines = f"{TESTS}/recipe.csv", variants_of(epochs), []
    first = variants[next(iter(names)), data]
    for variant, name in names.items():
        rows = variants[variant, data]
        compared = "-" if rows is first else change_of_labels(first, rows)
        seeds = {row["seed"] for row in rows}
        lines.append([name, str(len(seeds)), *means_over_seeds(rows), compared, source(path, rows)])
    return table(f"{what}, seeds, labels ± between seeds, WT, TC, ET, "
                 "difference of labels (95 % interval) and better in, source", lines)  # fmt: skip


def equal_minutes() -> list[str]:
    """Variants of Swin UNETR, and the U-Net for as many minutes; differences are those to Swin UNETR of 2022."""
    path, variants, lines = f"{TESTS}/recipe.csv", variants_of("20"), []
    variants = {key: rows for key, rows in variants.items() if key[0].startswith("swin")} | variants_of("110")
    reference = variants["swin", "real64cv"]
    for rows in variants.values():
        folds = {(row["seed"], row["fold"]): float(row["minutes"]) for row in timed(rows)}
        minutes = f"{fmean(folds.values()):.1f}" if folds else "-"
        name, *cells = variant_cells(rows, reference)
        lines.append([name, rows[0]["epochs"], minutes, *cells, f"{float(rows[0]['gmac']):.1f}", step_of(rows),
                      source(path, rows)])  # fmt: skip
    return table("network, epochs, minutes a fold, seeds, labels ± between seeds, WT, TC, ET, "
                 "difference of labels (95 % interval) and better in, GMAC, step, source", lines)  # fmt: skip


def variants_of(epochs: str) -> dict[tuple[str, str], list[dict]]:
    """The rows of recipe.csv by variant and data."""
    variants = {}
    for row in read(f"{TESTS}/recipe.csv", epochs=epochs):
        variants.setdefault((row["variant"], row["data"]), []).append(row)
    return variants


def timed(rows: list[dict]) -> list[dict]:
    """Those whose times compare: some seeds were trained on a processor without AVX-512, in float32."""
    return [row for row in rows if instruction_set(row["device"]) == SETS[1]]


def step_of(rows: list[dict]) -> str:
    return seconds(middle(timed(rows), "step_ms") / 1e3) if timed(rows) else "-"


def variant_cells(rows: list[dict], reference: list[dict]) -> list[str]:
    """Name and flags of a variant, how many seeds, its scores, and what it changes at the seeds that both have."""
    variant, as_before = FORMER.get(rows[0]["variant"], (rows[0]["variant"], ""))
    script, flags = recipe.VARIANTS[variant]
    flags, seeds = flags.replace(recipe.SWIN, "").strip(), {row["seed"] for row in rows}
    name = NETWORKS[script.removeprefix("train_").removesuffix(".py")] + f" `{flags}`" * bool(flags) + as_before
    if rows[0]["data"] == "real64z":
        name += ", z-scores (`preprocess_brats.py --normalize zscore`)"
    elif not flags:
        name += ", **default**"
    same_seeds = [row for row in reference if row["seed"] in seeds]
    compared = "-" if rows is reference else change_of_labels(same_seeds, rows)
    return [name, str(len(seeds)), *means_over_seeds(rows), compared]


def starts() -> list[str]:
    """What a short training on three patients reaches from several weights; the first line is from random ones."""
    path, groups, lines = f"{TESTS}/initial_weights.csv", {}, []
    names = {"random": "random", "patients": "6 other patients", "phantoms": "24 heads", "phantoms-64": "64 heads",
             "varied-64": "64 varied heads",
             "varied-strong-64": "64 varied heads, `--augmentation strong`"}  # fmt: skip
    for row in read(path):
        groups.setdefault((row["start"], row["epochs"]), []).append(row)
    first = groups["random", "10"]
    for start, epochs in sorted(groups, key=lambda key: ([*names].index(key[0]), key)):
        each = groups[start, epochs]
        compared = "-" if each is first else change_of_labels(first, each)
        lines.append([names[start], epochs, *means_over_seeds(each), compared, source(path, each)])
    return table("weights from, epochs on 3 patients, labels ± between seeds, WT, TC, ET, "
                 "difference of labels (95 % interval) and better in, source", lines)  # fmt: skip


def means_over_seeds(rows: list[dict]) -> list[str]:
    """Cells of the mean Dice of the labels, WT, TC and ET, the first of them with the spread between seeds."""
    seeds = sorted({row["seed"] for row in rows})
    per_seed = np.array([label_means([row for row in rows if row["seed"] == seed]) for seed in seeds])
    return [over_seeds([*per_seed[:, 0]]), *(f"{mean:.3f}" for mean in per_seed[:, 1:].mean(0))]


def label_means(rows: list[dict]) -> np.ndarray:
    """[4]: the mean Dice of the labels, of WT, TC and ET."""
    return recipe.means(np.array(list(recipe.scores_of(rows).values())))


def change_of_labels(rows: list[dict], others: list[dict]) -> str:
    """How much better the labels of the others are, paired by case."""
    change, (low, high), better, count = recipe.difference(recipe.scores_of(rows), recipe.scores_of(others))
    return f"{change[0]:+.3f} ({low[0]:+.3f} to {high[0]:+.3f}), {better} of {count}"
