#!/usr/bin/env python3
"""How fast the viewer opens a case and follows the wheel, in a real Tk window of 1000 x 1000 pixels.

  xvfb-run -s "-screen 0 1600x1300x24" python tests/benchmarks/viewer_speed.py CASE --against OTHER_CHECKOUT \\
      --csv tests/benchmarks/results/viewer_speed.csv

Each round starts a new process per checkout, in turn. A case is opened, from its files to the first frame on the screen
(imports excluded); then 60 notches of the wheel, each from the event to the frame that the X server has drawn, with the
cursor over a pane, the prediction filled (the truth, shifted) and the truth as an outline.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTCHES, WARM_UP = 60, 10
SIDE_PX = 1000
CURSOR = {"x": 260, "y": 300}  # over the first pane
INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "avx", "sse4_2")


def measure(case: Path) -> dict:
    """One opening and the notches, with the checkout that comes first on the module path."""
    import matplotlib

    matplotlib.use("TkAgg")
    import numpy as np
    from matplotlib import pyplot

    # Imports are not what is measured.
    from models.viewer.scene import find_scenes
    from models.viewer.segmentation import with_prediction
    from models.viewer.window import Viewer, new_figure

    pyplot.close(pyplot.figure())  # nor is the start of Tk
    start, start_cpu = time.perf_counter(), time.process_time()
    scene = next(iter(find_scenes(case, None).values()))()
    loaded = time.perf_counter()
    viewer = Viewer(new_figure(with_window=True), scene)
    canvas = viewer.figure.canvas
    canvas.manager.show()
    finish(viewer)
    opened = {"load_s": loaded - start, "open_s": time.perf_counter() - start,
              "open_cpu_s": time.process_time() - start_cpu}  # fmt: skip

    truth = scene.maps["truth"]
    viewer.show_maps(with_prediction(scene, np.roll(truth, (4, 5, 2), (0, 1, 2))))
    widget = canvas.get_tk_widget()
    window = canvas.manager.window
    toolbar_px = window.winfo_height() - widget.winfo_height()
    window.geometry(f"{SIDE_PX}x{SIDE_PX + toolbar_px}")
    finish(viewer)
    times, cpu = [], []
    for notch in range(WARM_UP + NOTCHES):
        start, start_cpu = time.perf_counter(), time.process_time()
        widget.event_generate("<Button-4>" if notch // 20 % 2 else "<Button-5>", **CURSOR, when="now")
        finish(viewer)
        times.append((time.perf_counter() - start) * 1e3)
        cpu.append((time.process_time() - start_cpu) * 1e3)
    times, cpu = times[WARM_UP:], cpu[WARM_UP:]
    return opened | {
        "notch_ms": statistics.median(times), "notch_p95_ms": statistics.quantiles(times, n=20)[-1],
        "notch_cpu_ms": statistics.median(cpu), "canvas_px": f"{widget.winfo_width()} x {widget.winfo_height()}",
    }  # fmt: skip


def finish(viewer):
    """Let the window do what waits, until the X server has answered for the last of it."""
    canvas = viewer.figure.canvas
    canvas.flush_events()
    while viewer.stale or not viewer.backgrounds:
        canvas.flush_events()
    canvas.flush_events()
    canvas.get_tk_widget().winfo_pointerx()  # a question that is answered after what was sent before it


def measured_apart(checkout: Path, case: Path) -> dict:
    command = [sys.executable, __file__, case, "--measure"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def machine() -> dict:
    """The processor and the widest of its instruction sets, as Linux names them."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in info.items()}
    return {"processor": fields["model name"],
            "instruction_set": next((name for name in INSTRUCTION_SETS if name in fields["flags"].split()), "")}


def commit(checkout: Path) -> str:
    describe = ["git", "-C", checkout, "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path, help="folder of a labelled case")
    parser.add_argument("--against", type=Path, help="another checkout, to be measured in turn with this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.case)))
        return
    checkouts = {"before": args.against, "now": ROOT} if args.against else {"now": ROOT}
    rows = []
    for number in range(1, args.rounds + 1):
        for name, checkout in checkouts.items():
            rows.append({"code": name, "commit": commit(checkout), "round": number, "case": args.case.name}
                        | measured_apart(checkout, args.case) | machine()
                        | {"load_average": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d")})
            print({key: rows[-1][key] for key in ("code", "open_s", "notch_ms", "notch_p95_ms")}, file=sys.stderr)
    for key in ("load_s", "open_s", "open_cpu_s", "notch_ms", "notch_p95_ms", "notch_cpu_ms"):
        medians = {name: statistics.median(row[key] for row in rows if row["code"] == name) for name in checkouts}
        print(f"{key:14}", "  ".join(f"{name} {value:.3g}" for name, value in medians.items()))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
