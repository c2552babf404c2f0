"""The figures of the inference benchmark. Knows the rows of its table, not its file."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from models.benchmark.table import Row, row_name
from models.inference.predict import STAGES
from models.plots import save_figure

# Okabe & Ito's colours, which colour-blind people can distinguish
ENGINE_COLORS = {
    "eager": "#999999", "fused": "#56B4E9", "compile": "#0072B2", "cudagraph": "#009E73", "aot": "#CC79A7",
    "onnx": "#E69F00", "openvino": "#D55E00",
}  # fmt: skip
STAGE_COLORS = ("#56B4E9", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#999999")
DTYPE_LINES = {"float32": "-", "tf32": "-.", "bf16": "--", "fp16": ":", "int8": (0, (4, 1, 1, 1, 1, 1))}
MARKERS = "osD^vP*X"


def draw(rows: list[Row], latest: list[Row], spent_ms: dict, stem: Path) -> list[Path]:
    """The figures of this run, as <stem>-<name>.png; those over batch and size show `latest`, of earlier runs too.

    spent_ms: network -> row -> category -> ms of one pass; empty where nothing was profiled.
    """
    done = [row for row in rows if row.status == "ok"]
    if not done:
        return []
    title = f"{done[0].device}, torch {done[0].torch}, {done[0].date}"

    def path(name: str) -> Path:
        return stem.with_name(f"{stem.name}-{name}.png")

    batches = sorted({row.batch for row in rows})
    shapes = [*sorted({row.size for row in rows}), *(f"batch{batch}" for batch in batches if batches != [1])]
    drawn = [path(f"latency-{'-'.join(map(str, shapes))}")]
    latency_bars(done, drawn[0], title)
    for name, x, y, labels in (
        ("throughput", "batch", "volumes_per_s", ("volumes per pass", "volumes per second")),
        ("memory", "size", "peak_gib", ("side in voxels", "peak GiB")),
    ):
        if lines_over(latest, x, y, *labels, path(name), title):
            drawn.append(path(name))
    if scored := [row for row in done if row.dice is not None]:
        drawn.append(path("speed-accuracy"))
        speed_accuracy(scored, drawn[-1], title)
    stages_ms = {}
    for row in sorted(done, key=lambda row: row.p50_ms):
        if row.load_ms is not None:
            parts = {stage: getattr(row, f"{stage}_ms") for stage in STAGES}
            stages_ms.setdefault(row.network, {})[row_name(row)] = parts
    if stages_ms:
        drawn.append(path("end-to-end"))
        stacked_bars(stages_ms, drawn[-1], f"From four files to a label map on disk. {title}")
    if spent_ms:
        drawn.append(path("profile"))
        stacked_bars(spent_ms, drawn[-1], f"Where the time of one pass goes. {title}")
    return drawn


def latency_bars(rows: list[Row], path, title: str):
    """A bar of median latency per row, a whisker to the 90th percentile, and a line at the floor; a panel per network,
    batch and size, for only there do times compare."""
    panels = {}
    for row in rows:
        key = f"{row.network}, {row.size}³ voxels, batch {row.batch}"
        panels.setdefault(key, []).append(row)
    heights = [max(2, len(panel)) for panel in panels.values()]
    figure = Figure(figsize=(11, 0.34 * sum(heights) + 1.1 * len(panels) + 0.6))
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (name, panel) in zip(grid[:, 0], panels.items(), strict=True):
        panel = sorted(panel, key=lambda row: row.p50_ms)
        medians = [row.p50_ms for row in panel]
        beyond = [max(0.0, row.p90_ms - row.p50_ms) for row in panel]
        places = range(len(panel))
        axes.barh(places, medians, xerr=[[0] * len(panel), beyond], color=[ENGINE_COLORS[r.engine] for r in panel],
                  error_kw={"ecolor": "#444444", "lw": 1})
        for place, row in zip(places, panel, strict=True):
            axes.plot([row.floor_ms] * 2, [place - 0.4, place + 0.4], color="black", lw=2)
            axes.annotate(three_digits(row.p50_ms), (row.p90_ms, place), (4, 0), textcoords="offset points",
                          va="center", fontsize=8)
        axes.set_yticks(places, [row_name(row) for row in panel], fontsize=8)
        axes.set(xlim=(0, 1.12 * max(row.p90_ms for row in panel)), title=name)
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
    grid[-1, 0].set_xlabel("ms per batch: median, whisker to the 90th percentile; black line: floor of this machine")
    figure.suptitle(title)
    save_figure(figure, path)


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def lines_over(rows: list[Row], x: str, y: str, x_label: str, y_label: str, path, title: str) -> bool:
    """Column `y` over column `x` ("size" or "batch"): a line per model, engine and type, a panel per network and value
    of the other of the two. What has no two places on `x` to join is left out; if all is, there is no figure, and False
    comes back."""
    other = "batch" if x == "size" else "size"
    panels = {}
    for row in rows:
        lines = panels.setdefault(f"{row.network}, {other} {getattr(row, other)}", {})
        model = f"{row.model} ({row.parameters / 1e6:.1f} M)"
        lines.setdefault((model, row.engine, row.dtype), []).append((getattr(row, x), getattr(row, y)))
    for name, lines in panels.items():
        panels[name] = {key: points for key, points in lines.items() if len(points) > 1}
    panels = {name: lines for name, lines in panels.items() if lines}
    if not panels:
        return False
    figure = Figure(figsize=(6.5 * len(panels), 5))
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (name, lines) in zip(grid[0], panels.items(), strict=True):
        models = list(dict.fromkeys(model for model, _, _ in lines))
        for (model, engine, dtype), points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), color=ENGINE_COLORS[engine], ls=DTYPE_LINES[dtype], lw=1.2,
                      marker=MARKERS[models.index(model) % len(MARKERS)], label=f"{model}: {engine}, {dtype}")
        axes.set(xlabel=x_label, ylabel=y_label, title=name)
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.set_xticks(sorted({place for points in lines.values() for place, _ in points}))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2 if len(lines) > 10 else 1)
    figure.suptitle(title)
    save_figure(figure, path)
    return True


def speed_accuracy(rows: list[Row], path, title: str):
    """Dice against latency (logarithmic), a point per row that has a Dice: up and to the left is better."""
    figure = Figure(figsize=(11, 6))
    axes = figure.subplots()
    models = list(dict.fromkeys(row.model for row in rows))
    for row in rows:
        marker = MARKERS[models.index(row.model) % len(MARKERS)]
        filled = row.dtype in ("float32", "tf32")
        color = ENGINE_COLORS[row.engine]
        axes.plot(row.p50_ms, row.dice, marker, color=color, ms=9, mfc=color if filled else "none", mew=1.8)
    axes.set(xscale="log", ylim=(0, 1), xlabel="ms per volume (median)",
             ylabel="mean label Dice on the test cases of the run")
    for number, model in enumerate(models):
        axes.plot([], [], MARKERS[number % len(MARKERS)], color="black", ls="none", label=model)
    beside = {"frameon": False, "bbox_to_anchor": (1.01, 1), "loc": "upper left"}
    named = axes.legend(title="run; hollow: 16 bits or 8", **beside)
    axes.add_artist(named)
    engines = dict.fromkeys(row.engine for row in rows)
    shown = [Patch(color=ENGINE_COLORS[engine], label=engine) for engine in engines]
    axes.legend(handles=shown, title="engine", **beside | {"bbox_to_anchor": (1.01, 0), "loc": "lower left"})
    axes.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    save_figure(figure, path, rect=(0, 0, 0.9, 1))  # the legends stand beside the axes


def stacked_bars(panels: dict[str, dict[str, dict[str, float]]], path, title: str):
    """What a time is made of: a panel per network with a scale of its own, in it a horizontal bar per name, its parts
    in ms from left to right."""
    parts = list(dict.fromkeys(part for bars in panels.values() for bar in bars.values() for part in bar))
    heights = [len(bars) for bars in panels.values()]
    height = 0.36 * sum(heights) + 0.9 * len(panels) + 0.9  # inches
    figure = Figure(figsize=(12, height))
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (name, bars) in zip(grid[:, 0], panels.items(), strict=True):
        longest = max(sum(bar.values()) for bar in bars.values())
        for place, bar in enumerate(bars.values()):
            left = 0.0
            for part, color in zip(parts, STAGE_COLORS, strict=False):
                width = bar.get(part, 0.0)
                axes.barh(place, width, left=left, color=color, edgecolor="white", height=0.75)
                if width > 0.035 * longest:
                    axes.text(left + width / 2, place, three_digits(width), ha="center", va="center", fontsize=8)
                left += width
            axes.text(left + 0.005 * longest, place, f"{three_digits(left)} ms", va="center", fontsize=9)
        axes.set_yticks(range(len(bars)), list(bars), fontsize=9)
        axes.set(xlim=(0, 1.1 * longest), ylim=(len(bars) - 0.4, -0.6), title=name)
    grid[-1, 0].set_xlabel("ms")
    handles = [Patch(color=color, label=part) for part, color in zip(parts, STAGE_COLORS, strict=False)]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    save_figure(figure, path, rect=(0, 0.35 / height, 1, 1))
