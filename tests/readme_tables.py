#!/usr/bin/env python3
"""The tables of README.md, RESULTS.md and the model cards, generated from committed CSV files: what stands between
`<!-- table: NAME -->` and `<!-- end -->` there is what the function of that name returns here.

  python tests/readme_tables.py        (writes them anew; a table whose CSV is missing is named and left as it is)
"""

import json
import re
import sys
from functools import partial

from table_cells import (
    NETWORKS,
    REGIONS,
    ROOT,
    SETS,
    TESTS,
    by_set,
    dice_of_folds,
    folds_of,
    instruction_set,
    middle,
    over_seeds,
    read,
    regions_over_seeds,
    seconds,
    source,
    source_of_folds,
    table,
)

sys.path.insert(0, str(ROOT))

import recipe_tables

from models.evaluation.statistics import mean_interval

README = ROOT / "README.md"
ENGINES = "models/benchmark/results"
FUZZED = {"nifti": "NIfTI file", "case": "case", "tensor": "tensor file", "checkpoint": "checkpoint"}
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def swinunetr_speed(mode: str, dtype: str) -> list[dict]:
    """A row per device: our median seconds, and how many times as long MONAI's network takes as it comes, and in its
    fastest setting."""
    summary = []
    for rows in by_set(read(f"{TESTS}/swinunetr_speed_cpu.csv", "device", mode=mode, dtype=dtype)).values():
        names = {row["network"] for row in rows}
        medians = {name: middle([row for row in rows if row["network"] == name], "seconds") for name in names}
        ours = min(medians[name] for name in names if name.startswith("ours"))
        kept = min(medians[name] for name in names if name.startswith("monai") and "memory kept" in name)
        fastest = min(medians[name] for name in names if name.startswith("monai") and "memory kept" not in name)
        ratios = {"monai": medians["monai"] / ours, "fastest": fastest / ours, "kept": kept / ours}
        summary.append(rows[0] | {"seconds": ours} | ratios)
    return summary


def counted_gib(size: str, feature_size: str, precision: str) -> dict[str, float]:
    """The memory of a training step by network: "ours", "monai" and so on; and the commit."""
    (row,) = read(f"{TESTS}/swinunetr_memory.csv", size=size, feature_size=feature_size, precision=precision)
    counted = {key.removesuffix(" (counted GiB)"): value for key, value in row.items() if key.endswith("(counted GiB)")}
    return {name: float(value) for name, value in counted.items()} | {"commit": row["commit"]}


def both_sets(rows: list[dict], text, device: str = "device") -> list[str]:
    """A cell for each of SETS: what `text` makes of its rows, or a dash."""
    groups = by_set(rows, device)
    return [text(groups[name]) if name in groups else "-" for name in SETS]


def timed(work: str, file: str, rows: list[dict], column: str, faster: dict, memory: str = "-", device: str = "device"):
    """A line of `stages`: medians of a column of seconds, or of ms; `faster` has columns of ratios, and than what."""
    unit_s, groups = 1e-3 if column.endswith("_ms") else 1, by_set(rows, device)
    cells = both_sets(rows, lambda some: seconds(unit_s * middle(some, column)), device)
    measured = [groups[name] for name in SETS if name in groups]
    ratios = {than: " and ".join(f"**{middle(some, key):.1f}**" for some in measured) for key, than in faster.items()}
    compared = ", ".join(f"{times} times faster than {than}" for than, times in ratios.items())
    return [work, *cells, compared or "-", memory, source(f"{TESTS}/{file}", rows)]


# ---- the tables ----------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    def took(rows):
        set_up = f", after {float(rows[-1]['setup_minutes']):.1f} min of set-up" if "setup_minutes" in rows[-1] else ""
        return f"{float(rows[-1]['minutes']):.1f} min{set_up}"

    demo, tests = read(f"{TESTS}/demo.csv", "device"), read(f"{TESTS}/test_minutes.csv", "device", command="make test")
    what = "makes synthetic patients, shows one, preprocesses them, trains both networks and compares them"
    return table(f"command, what it does, {', '.join(SETS)}, source", [
        ["`make demo`", what, *both_sets(demo, took), source(f"{TESTS}/demo.csv", demo)],
        ["`make test`", "checks the style and runs the tests", *both_sets(tests, took),
         source(f"{TESTS}/test_minutes.csv", tests)],
    ])  # fmt: skip


def headlines() -> list[str]:
    counted = counted_gib("128", "48", "bf16")
    latest = {(row["device"], row["seed"]): row for row in read(f"{TESTS}/demo.csv")}
    demos = max(by_set([*latest.values()]).values(), key=len)  # the machine that tried most seeds
    unet, transformer = (
        regions_over_seeds({region: [float(row[f"{network}_{region}"]) for row in demos] for region in REGIONS})
        for network in NETWORKS
    )
    lines = [
        ["Dice on 12 real cases, cross-validated at 96³, mean (± between 3 seeds)", f"U-Net: {dice_of_folds('unet')}",
         f"Swin UNETR: {dice_of_folds('swinunetr')}", source_of_folds("unet")],
        ["Dice on the synthetic test cases of `make demo` (± between seeds)", f"U-Net: {unet}",
         f"Swin UNETR: {transformer}", source(f"{TESTS}/demo.csv", demos)],
    ]  # fmt: skip
    work, *cells, faster, _, link = swinunetr()[1]
    times = ", ".join(f"{name}: {cell}" for name, cell in zip(SETS, cells, strict=True) if cell != "-")
    lines.append([f"Stage {work}", times, faster, link])
    names = ("ours", "ours, full", "monai", "monai, use_checkpoint")
    ours, ours_least, monai, monai_least = (f"{counted[name]:.1f} GiB" for name in names)
    lines.append(["Memory of a training step of Swin UNETR, 128³, bf16, counted (with checkpointing)",
                  f"{ours} ({ours_least})", f"MONAI: {monai} ({monai_least})",
                  source(f"{TESTS}/swinunetr_memory.csv", [counted])])  # fmt: skip
    return table("result, here, comparison, source", lines)


def stages() -> list[str]:
    lines = []
    for work, column in (("open a case", "open_s"), ("turn the wheel one notch", "notch_ms")):
        rows = read(f"{TESTS}/viewer_speed.csv", code="now")
        lines.append(timed(f"1 look: {work}", "viewer_speed.csv", rows, column, {}, device="instruction_set"))
    lines.append(preprocessing())
    for work, how in (("flips, turns, noise", ""), ("flips, turns, noise, strong", " with `--augmentation strong`")):
        rows = read(f"{TESTS}/training_input.csv", "device", work=work, stored="float16 + uint8")
        rows = [row for row in rows if row["device"].endswith(" 1 threads")]
        work = f"3 and 4, train: augment a case of 128³{how}"
        lines.append(timed(work, "training_input.csv", rows, "ours_ms", {"monai_over_ours": "MONAI"}))
    for work, side, batch in (("training step", "64", "1"), ("inference", "96", "1")):
        wanted = {"network": "unet", "pass": work, "side": side, "batch": batch}
        rows = read(f"{TESTS}/small_convolutions.csv", "device", **wanted)
        work = f"{'4 evaluate' if work == 'inference' else '3 train'}: U-Net, {work}, {side}³, batch {batch}"
        lines.append(timed(work, "small_convolutions.csv", rows, "ours_s", {"times_faster": "torch's convolutions"}))
    rows = read(f"{TESTS}/evaluation_cohort.csv", cases="126")
    memory = f"{float(rows[-1]['main_process_peak_mib']) / 1024:.1f} GiB, 126 cases"
    work = "4 evaluate: a case besides the network"
    evaluation = timed(work, "evaluation_cohort.csv", rows, "outside_s_per_case", {}, memory, "instruction_set")
    return table(f"stage, {', '.join(SETS)}, comparison, memory, source", [*lines, *swinunetr(), evaluation])


def preprocessing() -> list[str]:
    cases, file = read(f"{TESTS}/preprocessing_speed.csv", "processor", compact="False"), "preprocessing_speed.csv"
    memory = f"{max(float(row['worker_peak_gib']) for row in cases):.2f} GiB a worker"
    work, faster = "2 preprocess: a case to 128³, CPU time", {"monai_over_ours": "MONAI"}
    return timed(work, file, cases, "ours_cpu_s", faster, memory, "processor")


def swinunetr() -> list[list[str]]:
    faster = {"monai": "MONAI", "fastest": "its fastest setting", "kept": "that with our way of keeping memory"}
    lines = []
    memory = {"training": f"{counted_gib('64', '12', 'float32')['ours']:.2f} GiB, counted", "inference": "-"}
    for work, mode, dtype in (("4 train: Swin UNETR, training step, 64³", "training", "float32"),
                              ("4 evaluate: Swin UNETR, inference, 96³", "inference", "float32"),
                              ("4 evaluate: Swin UNETR, inference, 96³", "inference", "bf16")):  # fmt: skip
        rows, file = swinunetr_speed(mode, dtype), "swinunetr_speed_cpu.csv"
        if rows:  # a machine that only emulates bf16 leaves it out
            lines.append(timed(f"{work}, {dtype}", file, rows, "seconds", faster, memory[mode]))
    return lines


def cross_validation(*networks: str) -> list[str]:
    """Of all networks, or of those named."""
    lines = []
    for network in networks or NETWORKS:
        for target in REGIONS:
            cells = []
            for measure in ("dice", "ceiling_dice", "hd95_mm", "nsd_1mm", "lesion2026_dice", "lesion2023_dice"):
                values, digits = folds_of(network, target, measure), 1 if measure == "hd95_mm" else 3
                if measure == "ceiling_dice":  # the truth's, the same for all seeds
                    cells.append(f"{values.mean():.{digits}f}")
                    continue
                low, high = mean_interval(values.mean(0))
                cells.append(f"{over_seeds([*values.mean(1)], digits)} ({low:.{digits}f}-{high:.{digits}f})")
            link = source_of_folds(network) if target == REGIONS[0] else ""
            lines.append([f"{NETWORKS[network]}, {target}", *cells, link])
    return table("mean of 12 cases ± between seeds (95 % interval), Dice, ceiling, HD95 in mm, NSD at 1 mm, "
                 "lesion Dice of 2026, lesion Dice of 2023, source", lines)  # fmt: skip


def weights() -> list[str]:
    """What comes with the project, and the scores of the same training cross-validated."""
    lines = []
    for network, ending in (*((network, "") for network in NETWORKS), *((network, "-heads") for network in NETWORKS)):
        folder = f"models/{network}/results/pretrained{ending}"
        record = json.loads((ROOT / folder / "config.json").read_text(encoding="utf-8"))
        epochs, side, cases = record["arguments"]["epochs"], record["size"][0], len(record["split"]["train"])
        trained_on = f"{cases} {'synthetic heads' if ending else 'patients'} at {side}³, {epochs} epochs"
        lines.append([
            f"`{network}{ending}`", f"{NETWORKS[network]}, {record['parameters'] / 1e6:.1f} million weights",
            f"{(ROOT / folder / 'best.pt').stat().st_size / 1e6:.1f} MB",
            trained_on + " after synthetic heads" * ("initial_weights" in record),
            "for `--init` alone" if ending else dice_of_folds(network),
            f"[card]({folder}/MODEL_CARD.md) `{record['git_commit'][:7]}`",
        ])  # fmt: skip
    return table("name, network, file, trained on, Dice of the same training cross-validated, more", lines)


def scaling() -> list[str]:
    path, lines = f"{TESTS}/scaling.csv", []
    rows = read(path, "device")
    for device in dict.fromkeys(row["device"] for row in rows):
        cells = []
        for network in NETWORKS:
            (row,) = (row for row in rows if (row["network"], row["device"]) == (network, device))
            step = seconds(float(row["computed_step_ms"]) / 1e3)
            if row["measured_step_ms"]:  # of a processor, at a size that it does in seconds
                measured = seconds(float(row["measured_step_ms"]) / 1e3)
                cells += [f"{step} at {row['side']}³, measured {measured}", "-"]
            else:
                fits = "" if float(row["needed_gib"]) < float(row["memory_gib"]) else ", too little memory"
                hours = float(row["hours_a_fold"])
                cells += [step, (f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.1f} h") + fits]
        lines.append([device.removesuffix(", off"), *cells])
    lines = [[*line, source(path, rows) if not index else ""] for index, line in enumerate(lines)]
    return table("GPU, U-Net: step, 200 epochs, Swin UNETR: step, 300 epochs, source", lines)


def engines() -> list[str]:
    """For each machine, network and number type, the fastest engine."""
    lines, tables = [], sorted(path.name for path in (ROOT / ENGINES).glob("inference-*.csv"))
    if not tables:
        raise FileNotFoundError(2, "no such file", f"{ENGINES}/inference-*.csv")
    for name in (name for name in tables if not name.endswith("-profile.csv")):
        rows = read(f"{ENGINES}/{name}", size="96", batch="1", status="ok")
        rows = [row for row in rows if row["times_faster_than_monai_eager"] and row["model"] in ("unet", "swinunetr")]
        latest, best = {(row["model"], row["engine"], row["dtype"]): row for row in rows}, {}
        for row in sorted(latest.values(), key=lambda row: float(row["p50_ms"])):
            best.setdefault((row["model"], row["dtype"]), row)
        for row in sorted(best.values(), key=lambda row: row["model"], reverse=True):
            spent = [row[f"{stage}_ms"] for stage in ("load", "preprocess", "forward", "postprocess", "write")]
            p50, floor, faster, gib, first_s, equal = (float(row[key]) for key in (
                "p50_ms", "floor_ms", "times_faster_than_monai_eager", "peak_gib", "first_use_s", "label_agreement"))
            lines.append([
                instruction_set(row["device"]), f"{row['model']}: {row['engine']}, {row['dtype']}", seconds(p50 / 1e3),
                seconds(floor / 1e3), f"{faster:.1f}", f"{gib:.1f} GiB", f"{first_s:.0f} s", f"{equal:.2%}",
                seconds(sum(map(float, spent)) / 1e3) if all(spent) else "-", source(f"{ENGINES}/{name}", [row]),
            ])  # fmt: skip
    return table("machine, network: engine and number type, median, floor, times faster than MONAI, peak, ready after, "
                 "equal labels, files to label map, source", lines)  # fmt: skip


def robustness() -> list[str]:
    kills, bad = (read(f"{TESTS}/{name}.csv") for name in ("kills", "bad_inputs"))
    lines = []
    for script in dict.fromkeys(row["what"] for row in kills):
        rows = [row for row in kills if row["what"] == script]
        tried, survived, minutes = (sum(float(row[key]) for row in rows) for key in ("kills", "survived", "minutes"))
        lines.append([f"`{script}` killed at random moments and started again, {minutes:.0f} min",
                      f"{tried:.0f} kills",
                      f"after {survived:.0f} all files as without", source(f"{TESTS}/kills.csv", rows)])  # fmt: skip
    refused = [row for row in bad if row["status"] == "2"]
    scripts = len({row["script"] for row in bad})
    lines.append([f"broken and hostile inputs of {scripts} scripts", f"{len(bad)} kinds",
                  f"{len(refused)} refused in one line, {len(bad) - len(refused)} that can be read were read",
                  source(f"{TESTS}/bad_inputs.csv", bad[:1])])  # fmt: skip
    last = {row["reader"]: row for row in read(f"{TESTS}/fuzz.csv")}  # what was found before is mended
    for row in last.values():
        lines.append([f"the reader of a {FUZZED[row['reader']]} fuzzed, {float(row['minutes']):.0f} min, "
                      f"{float(row['cpu_minutes']):.1f} of a processor",
                      f"{int(row['executions']):,} inputs", "nothing found" if row["findings"] == "0" else "a finding",
                      source(f"{TESTS}/fuzz.csv", [row])])  # fmt: skip
    return table("what, tried, outcome, source", lines)


TABLES = {make.__name__: make for make in (commands, headlines, stages, engines, cross_validation,
                                           recipe_tables.worth, weights)}  # fmt: skip


def elsewhere(up: str, make, *arguments) -> list[str]:
    """A table for a file that is `up` from the README."""
    return [line.replace("](", f"]({up}") for line in make(*arguments)]


FURTHER = (recipe_tables.networks, recipe_tables.beginnings, recipe_tables.islands, recipe_tables.factors,
           recipe_tables.equal_minutes, recipe_tables.starts, recipe_tables.heads, recipe_tables.short,
           recipe_tables.hospitals, scaling, robustness)  # fmt: skip
MORE = {ROOT / "tests/benchmarks/RESULTS.md": {make.__name__: partial(elsewhere, "../../", make) for make in FURTHER}}
CARDS = {  # model card -> its one table
    ROOT / f"models/{network}/results/pretrained/MODEL_CARD.md": {
        "scores": partial(elsewhere, "../../../../", cross_validation, network)
    }
    for network in NETWORKS
}


def main() -> str | None:
    missing = []
    for file, tables in ({README: TABLES} | MORE | CARDS).items():
        text = file.read_text(encoding="utf-8")
        for opening, name, old, end in BLOCK.findall(text):
            try:
                new = "".join(f"{line}\n" for line in tables[name]())
                text = text.replace(opening + old + end, opening + new + end)
            except FileNotFoundError as error:
                missing.append(f"{file.name}, table {name}: {error.filename} is missing.")
        file.write_text(text, encoding="utf-8")
    return "\n".join(missing) or None  # goes to stderr, exit status 1


if __name__ == "__main__":
    sys.exit(main())
