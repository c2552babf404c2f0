"""The files of an evaluation: tables, figures and report.html, made of what `scoring` has kept of each case."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median

from models.brats import REGIONS, TARGETS
from models.cost import forward_macs, parameter_count
from models.evaluation.jobs import Options, Work, item_of
from models.evaluation.plan import Entry, input_shape, training_minutes
from models.evaluation.report import STANDARDS, write_report
from models.evaluation.score_plots import draw_scores, draw_sheets, paired_dice
from models.evaluation.scoring import Scored, unpack
from models.evaluation.statistics import compare_runs, mean_region_dice, summarise
from models.files import write_atomically, write_csv
from models.inference.engines import engine_name
from models.plots import prediction_overlay

COSTS = ("parameters", "gmac", "forward_seconds_per_case", "training_minutes")


def write_all(out: Path, work: Work, kept: dict[str, list[Scored]], options: Options, failures: dict[str, str]) -> dict:
    """Write all files into the folder `out`. `kept` has what was kept of the cases of each entry, by its name;
    `failures` the cases that could not be read (name -> reason). Returns the content of summary.json."""
    rows = [row for each in kept.values() for one in each for row in one.rows]
    summary = summary_of(work, kept, rows, options)
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    if failures:
        write_csv(out / "failures.csv", [{"case": name, "reason": why} for name, why in sorted(failures.items())])
    panels = {name: {one.case: one.panel for one in each} for name, each in kept.items()}
    figures = {}
    if rows:
        write_csv(out / "per_case.csv", rows)
        counts = {name: sum(one.reliability for one in each) for name, each in kept.items()
                  if all(one.reliability is not None for one in each)}  # fmt: skip
        figures = draw_scores(rows, counts, out, title_of(summary))
        draw_extremes(work, kept, out)
    if len(work.entries) > 1 and rows:
        write_csv(out / "comparison.csv", comparison_table(summary))
        figures |= draw_comparison(work, kept, summary, rows, out)
    sheets = draw_sheets(rows, panels, out)
    scores = {name: run["scores"] for name, run in summary["runs"].items()}
    write_report(out / "report.html", rows, scores, summary["comparisons"], figures, sheets, panels, facts_of(summary))
    return summary


def summary_of(work: Work, kept: dict[str, list[Scored]], rows: list[dict], options: Options) -> dict:
    scores, runs = summarise(rows), {}
    for entry in work.entries:
        seconds = [one.seconds for one in kept[entry.name] if one.seconds is not None]
        cases = len(kept[entry.name])
        runs[entry.name] = {
            "split": entry.split,
            "cases": cases,
            "counted": counted(cases, entry.split),
            "trained_on": len({row["case"] for one in kept[entry.name] for row in one.rows if row["trained_on"]}),
            **(costs(entry, work) if entry.runs else {}),
            "forward_seconds_per_case": median(seconds) if seconds else None,
            "scores": scores.get(entry.name, {}),
        }
    return {
        "space": options.space,
        "tta": options.tta,
        "standards": list(STANDARDS.values()),
        "settings": {key: value for key, value in asdict(options).items()
                     if isinstance(value, bool | float | str | None) and key not in ("space", "tta")},
        "runs": runs,
        "comparisons": compare_runs(rows) if len(scores) > 1 else [],
    }  # fmt: skip


def costs(entry: Entry, work: Work) -> dict:
    """What the networks of an entry are and cost: those of one part together, because folds take turns."""
    part = entry.parts[0]
    networks = [work.networks[run.checkpoint] for run in part.runs]
    return {
        "model": "+".join(dict.fromkeys(run.network for run in part.runs)),
        "epoch": entry.runs[0].epoch if len(entry.runs) == 1 else None,
        "engine": "+".join(dict.fromkeys(engine_name(work.members[run.checkpoint].network) for run in part.runs)),
        "parameters": sum(map(parameter_count, networks)),
        "gmac": sum(forward_macs(network, input_shape(part)) for network in networks) / 1e9,
        "training_minutes": training_minutes(entry.runs),
    }


def comparison_table(summary: dict) -> list[dict]:
    """A row per entry: the mean of every measure and target, and what the networks cost."""
    rows = []
    for name, run in summary["runs"].items():
        targets = run["scores"].get(summary["space"], {})
        means = {f"{measure}_{target}": said["mean"] for target, measures in targets.items()
                 for measure, said in measures.items() if isinstance(said, dict) and "mean" in said}  # fmt: skip
        about = {"run": name, "model": run.get("model"), "split": run["split"], "cases": run["cases"]}
        rows.append(about | {"space": summary["space"]} | means | {key: run.get(key) for key in COSTS})
    return rows


def title_of(summary: dict) -> str:
    splits = dict.fromkeys(run["counted"] for run in summary["runs"].values())
    return f"{', '.join(splits)}, {summary['space']} space"


def counted(cases: int, split: str) -> str:
    """How many cases of what split, such as "1 test case" or "12 cases, cross-validated in 5 folds"."""
    return f"{cases} {split if cases != 1 else split.replace('cases', 'case', 1)}"


def facts_of(summary: dict) -> dict[str, str]:
    """What a reader of the report should know about what was scored."""
    facts = {"Cases": title_of(summary), "Mirror images": "8, averaged" if summary["tta"] else "none"}
    if share := summary["settings"]["islands"]:
        facts["Islands"] = f"parts of WT, TC or ET below {share:.0%} of the largest become background, ED or NCR"
    if summary["settings"]["small_et"]:
        facts["Small enhancing tumours"] = "become NCR below a volume chosen on the validation cases"
    return facts


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw_extremes(work: Work, kept: dict[str, list[Scored]], out: Path):
    """overlay_best.png, overlay_median.png and overlay_worst.png of each entry, by the mean Dice of WT, TC and ET."""
    for entry in work.entries:
        rows = [row for one in kept[entry.name] for row in one.rows]
        maps = {one.case: one.packed for one in kept[entry.name]}
        dice = mean_region_dice(rows).get(entry.name, {})
        ranked = sorted(dice, key=dice.get, reverse=True)
        for role, case in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
            item = item_of(work, entry, case)
            scores = {row["target"]: row["dice"] for row in rows if row["case"] == case}
            title = f"{entry.name}: {role} of {len(ranked)} cases by mean Dice of WT, TC and ET: {case}\n"
            title += f"Dice, {rows[0]['space']} space: "
            title += ", ".join(f"{target} {scores[target]:.3f}" for target in TARGETS)
            prefix = f"{entry.name}_" if len(work.entries) > 1 else ""
            path = out / f"{prefix}overlay_{role}.png"
            label = item.label.numpy()
            prediction_overlay(item.image.numpy(), label, {"prediction": unpack(maps[case])}, path, title)


def draw_comparison(work: Work, kept: dict[str, list[Scored]], summary: dict, rows: list[dict], out: Path) -> dict:
    """comparison_dice.png, and comparison_overlay_1.png to _3.png: the cases whose mean Dice differs most between the
    first entry and another. Entries of other cases are left out. Returns caption -> file, for the report."""
    dice = {name: {} for name in kept}
    for row in rows:
        dice[row["run"]].setdefault(row["case"], {})[row["target"]] = row["dice"]
    first = work.entries[0].name
    compared = [name for name in dice if dice[name].keys() == dice[first].keys()]
    if len(compared) < 2:
        return {}
    tests = [row for row in summary["comparisons"] if row["measure"] == "dice"]
    notes = {region: "Holm-corrected p " + ", ".join(f"{t['holm_p']:.2g}" for t in tests if t["target"] == region)
             for region in REGIONS}  # fmt: skip
    scores = {region: {run: [case[region] for case in dice[run].values()] for run in compared} for region in REGIONS}
    paired_dice(scores, out / "comparison_dice.png", f"{title_of(summary)}; each run tested against {first}", notes)

    means = mean_region_dice(rows)
    spread = {case: max(abs(means[run][case] - means[first][case]) for run in compared) for case in means[first]}
    for place, case in enumerate(sorted(spread, key=spread.get, reverse=True)[:3], start=1):
        item = item_of(work, work.entries[0], case)
        maps = {name: unpack(one.packed) for name in compared for one in kept[name] if one.case == case}
        # Another run can have been trained on another grid.
        maps = {name: labels for name, labels in maps.items() if labels.shape == tuple(item.label.shape)}
        title = f"{case}, number {place} of the cases that differ most\nmean Dice of WT, TC and ET: "
        title += ", ".join(f"{run} {means[run][case]:.3f}" for run in maps)
        path = out / f"comparison_overlay_{place}.png"
        prediction_overlay(item.image.numpy(), item.label.numpy(), maps, path, title)
    return {"Dice of every case under each run": out / "comparison_dice.png"}
