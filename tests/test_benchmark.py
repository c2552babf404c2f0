"""The inference benchmark: what it measures, what it writes, what it refuses, and what becomes of a row that fails."""

import csv
import gzip
import json
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image
from torch import nn

import benchmark_inference
from models import build_model, timing
from models.benchmark import figures, profiling, worker
from models.brats import MODALITIES
from models.inference.engines import ENGINES
from models.inference.exports import FORMAT
from models.runs import CHECKPOINT_FORMAT

SCRIPT = "benchmark_inference.py"
SMALL = ("--models", "unet", "--size", 32, "--engines", "eager", "--layout", "contiguous", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run as a training script leaves it: an untrained U-Net, made for 32^3 voxels."""
    run = tmp_path_factory.mktemp("runs") / "first"
    run.mkdir()
    model = build_model("unet")
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}
    torch.save({"format": CHECKPOINT_FORMAT, "network": "unet", "config": config, "modalities": list(MODALITIES),
                "epoch": 1, "model": model.state_dict()}, run / "best.pt")  # fmt: skip
    (run / "config.json").write_text(json.dumps({"size": [32, 32, 32]}))
    (run / "test_results.csv").write_text("case,dice_NCR,dice_ED,dice_ET\na,0,0,0\nmean,0.3,0.6,0.9\n")
    return run


@pytest.fixture(scope="module")
def first(raw, trained, tmp_path_factory):
    """A folder in which the script has measured the run, and what it printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    options = ("--models", "unet", "monai-unet", *SMALL[2:], "--run", trained, "--dtypes", "float32", "--repeats", 6)
    options += ("--max-seconds", 60, "--profile")
    options += ("--case", raw / "BraTS2021_00000")
    return folder, run_script(SCRIPT, *options, cwd=folder)


def rows_of(folder):
    (table,) = set((folder / "benchmarks").glob("inference-*.csv")) - set((folder / "benchmarks").glob("*-profile.csv"))
    return list(csv.DictReader(table.open(newline="")))


# ---- the script ----------------------------------------------------------------------------------------------------


def test_every_setting_is_a_row_with_its_measurements(first):
    folder, _ = first
    measured = [row for row in rows_of(folder) if row["status"] == "ok"]
    assert [row["model"] for row in measured] == ["unet-first", "unet", "monai-unet-first", "monai-unet"]
    for row in measured:
        times = [float(row[key]) for key in ("p50_ms", "p90_ms", "p99_ms")]
        assert 0 < times[0] <= times[1] <= times[2] and row["repeats"] == "6"
        assert float(row["volumes_per_s"]) == pytest.approx(1e3 / times[0], rel=1e-4)
        assert 0 < float(row["floor_ms"]) < times[0]
        share = 2 * float(row["gmac_per_volume"]) / times[0] / float(row["matrix_peak_tflops"])
        assert float(row["matrix_peak_share"]) == pytest.approx(share, rel=1e-3)
        assert 0.05 < float(row["peak_gib"]) < 8 and float(row["first_use_s"]) > 0
        assert all(float(row[f"{stage}_ms"]) > 0 for stage in ("load", "preprocess", "forward", "postprocess", "write"))
        assert float(row["label_agreement"]) >= 0.999 and float(row["max_logit_difference"]) < 1e-3
        assert row["dice"] == ("0.6" if row["model"].endswith("unet-first") else "")
        assert "--case" in row["command"] and row["date"] and row["torch"] == torch.__version__


def jobs_of(monkeypatch, *options):
    """The rows that the script would measure."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, options)])
    args = benchmark_inference.arguments()
    return benchmark_inference.make_jobs(args, benchmark_inference.choose_contestants(args))


def test_what_this_machine_cannot_run_is_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr("models.device.native_dtypes", lambda device: {torch.float32, torch.bfloat16})
    jobs = jobs_of(monkeypatch, *SMALL[:4], "--device", "cpu")
    assert {(job["engine"], job["dtype"]) for job in jobs} == {
        (engine, dtype) for engine in ENGINES for dtype in ("float32", "bf16")
    }
    reasons = {job["engine"]: job["status"] for job in jobs if "status" in job and job["dtype"] == "float32"}
    assert reasons["cudagraph"] == "not run: CUDA graphs need a CUDA device"
    assert reasons["fused"] == "not run: the network has no attention" and "eager" not in reasons


def test_a_type_that_is_only_emulated_is_listed_and_runs_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("models.device.native_dtypes", lambda device: {torch.float32})
    emulated = [job for job in jobs_of(monkeypatch, *SMALL) if job["dtype"] == "bf16"]
    assert [job["status"] for job in emulated] == ["not run: emulated on this processor"]
    (asked,) = jobs_of(monkeypatch, *SMALL, "--dtypes", "bf16")
    assert asked["dtype"] == "bf16" and "status" not in asked


def test_monais_classes_run_beside_ours_with_the_same_weights(monkeypatch):
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--feature-size", "12", "--size", "32"])
    chosen = benchmark_inference.choose_contestants(benchmark_inference.arguments())
    assert [one["model"] for one in chosen] == ["unet", "swinunetr", "monai-unet", "monai-swinunetr"]
    assert chosen[3]["config"] == chosen[1]["config"] == {"feature_size": 12}
    assert chosen[3]["engines"] == ["eager", "fused", "compile"]


def test_runs_of_different_width_each_have_their_own_of_monai(trained, tmp_path, monkeypatch):
    wide = dict(torch.load(trained / "best.pt", weights_only=True))
    wide["config"] = wide["config"] | {"channels": [8, 16, 32, 64, 128]}
    for name, checkpoint in (("wide", wide), ("again", wide)):
        (tmp_path / name).mkdir()
        torch.save(checkpoint, tmp_path / name / "best.pt")
    runs = [trained, tmp_path / "wide", tmp_path / "again"]
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--size", "32", "--run", *map(str, runs)])
    chosen = benchmark_inference.choose_contestants(benchmark_inference.arguments())
    assert [one["source"] for one in chosen if one["model"].startswith("monai-")] == [str(trained), str(runs[2])]


def test_the_last_line_is_json_and_names_the_table(first):
    folder, printed = first
    result = json.loads(printed.stdout.splitlines()[-1])
    assert (result["rows"], result["measured"]) == (4, 4)
    assert (folder / result["csv"]).is_file()
    assert result["fastest"]["unet-first"]["p50_ms"] == pytest.approx(float(rows_of(folder)[0]["p50_ms"]), rel=1e-4)


def test_the_figures_and_the_profile_are_there(first):
    folder, printed = first
    out = folder / "benchmarks"
    for name in ("latency-32", "speed-accuracy", "end-to-end", "profile"):
        (path,) = out.glob(f"inference-*-{name}.png")
        assert path.name in printed.stdout and np.asarray(Image.open(path).convert("L")).std() > 5
    for when in ("before", "after"):
        (operators,) = out.glob(f"inference-*-profile-unet-{when}.txt")
        assert "conv" in operators.read_text()
        trace = json.loads(gzip.decompress(operators.with_name(f"{operators.stem}-trace.json.gz").read_bytes()))
        assert any("conv" in event["name"] for event in trace["traceEvents"])
    (parts,) = out.glob("inference-*-profile.csv")
    spent = list(csv.DictReader(parts.open(newline="")))
    assert spent
    for row in spent:
        assert float(row["convolution"]) > float(row["norm"]) > 0 and row["row"].endswith("eager, float32")


def test_a_second_run_is_appended_and_adds_the_figure_over_the_batch(first):
    folder, _ = first
    before = len(rows_of(folder))
    printed = run_script(SCRIPT, *SMALL, "--dtypes", "float32", "--batch-sizes", 1, 2, "--repeats", 5, cwd=folder)
    rows = rows_of(folder)
    assert [row["batch"] for row in rows[before:]] == ["1", "2"]
    assert rows[0]["model"] == "unet-first" and all(float(row["label_agreement"]) >= 0.99 for row in rows[before:])
    assert "-throughput.png" in printed.stdout and "-memory.png" not in printed.stdout


REFUSED = [
    (("--engines", "tensorrt"), "there is no 'tensorrt'. There are: eager"),
    (("--dtypes", "int8"), "there is no 'int8'. There are: float32"),
    (("--dtypes", "fp16", "--device", "cpu"), "--dtypes fp16: cannot run here: fp16 is offered on CUDA only"),
    (("--engines", "cudagraph", "--device", "cpu"), "--engines cudagraph --dtypes float32: cannot run here: CUDA"),
    (("--models", "monai-swinunetr", "--engines", "aot"), "--engines aot: MONAI's networks run in eager, fused"),
    (("--size", "16"), "--size 16: unet cannot run on it (Expected more than 1 spatial element"),
    (("--size", "40"), "--size 40: unet needs a multiple of 16"),
    (("--case", "nowhere"), "nowhere: no such folder"),
    (("--run", "nowhere"), "nowhere: no such checkpoint"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_is_unusable_is_refused_in_one_line(tmp_path, options, message):
    result = run_script(SCRIPT, "--models", "unet", "--size", 32, *options, cwd=tmp_path, status=2)
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "benchmarks").exists()


def test_a_run_of_another_size_is_refused(trained, tmp_path):
    result = run_script(SCRIPT, "--run", trained, "--size", 64, cwd=tmp_path, status=2)
    assert f"--size 64: {trained} was made for 32 x 32 x 32 voxels" in result.stderr


def test_a_file_made_by_another_torch_is_refused(tmp_path):
    header = {"format": FORMAT, "torch": "2.0.1", "machine": "any"}
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("old/wrapper_metadata.json", json.dumps(header))
    result = run_script(SCRIPT, "--run", "old.pt2", cwd=tmp_path, status=2)
    assert "old.pt2: made for torch 2.0.1, and this is" in result.stderr and len(result.stderr.splitlines()) == 1


# ---- rows ----------------------------------------------------------------------------------------------------------

JOB = {"task": "row", "model": "unet", "network": "unet", "config": {}, "engine": "eager", "dtype": "float32",
       "layout": "contiguous", "size": 32, "batch": 1, "device": "cpu", "repeats": 5, "max_seconds": 10, "case": "",
       "profile": None, "macs": 2e9, "values": 3e6}  # fmt: skip


def test_a_row_that_cannot_be_allocated_is_out_of_memory(tmp_path):
    result = worker.perform(JOB | {"size": 2**14, "cache": str(tmp_path)})
    assert result == {"status": "out of memory"}


def test_a_row_that_fails_says_why(tmp_path):
    result = worker.perform(JOB | {"size": 17, "cache": str(tmp_path)})
    assert result["status"].startswith("failed: RuntimeError: ")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_process_that_the_system_killed_was_out_of_memory(monkeypatch):
    killed = subprocess.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    assert worker.result_of(killed.returncode, "") == {"status": "out of memory: killed by the system"}
    assert worker.result_of(3, "") == {"status": "failed: the process ended with exit status 3"}


@pytest.mark.parametrize(("network", "config"), [
    ("unet", {"channels": (8, 16, 32, 64, 128)}), ("swinunetr", {"feature_size": 12, "depths": (1, 1, 1, 1)}),
])  # fmt: skip
def test_monais_class_as_it_comes_gets_our_weights(network, config):
    ours = build_model(network, **config).eval()
    twin = worker.monai_twin(ours)
    assert type(twin).__module__.startswith("monai.")
    assert not [module for module in twin.modules() if type(module).__module__.startswith("models.")]
    image = torch.rand(1, 4, 64, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), twin(image), rtol=1e-4, atol=1e-4)


def test_ratios_are_to_monais_class_of_the_same_width_size_and_batch():
    def row(model, engine, p50_ms, batch=1, parameters=4):
        return {"model": model, "network": model.split("-")[-1], "engine": engine, "dtype": "float32", "status": "ok",
                "parameters": parameters, "size": 64, "batch": batch, "p50_ms": p50_ms}  # fmt: skip

    rows = [row("monai-swinunetr", "eager", 100.0), row("swinunetr", "fused", 20.0), row("swinunetr", "fused", 30.0, 2),
            row("swinunetr", "fused", 30.0, parameters=8), row("monai-swinunetr", "eager", 300.0, parameters=8),
            row("monai-unet", "compile", 1.0), row("monai-unet", "eager", 12.0), row("unet", "eager", 3.0)]  # fmt: skip
    worker.add_ratios(rows)
    ratios = [row.get("times_faster_than_monai_eager") for row in rows]
    assert ratios == [1.0, 5.0, None, 10.0, 1.0, 12.0, 1.0, 4.0]


def test_a_row_has_the_floor_of_its_batch_and_type():
    ability = {"peak_tflops": {"float32": 0.5, "bf16": 1.0}, "bandwidth_gb_s": 10.0}
    columns = ("status", "floor_ms", "volumes_per_s", "matrix_peak_share", "repeats", "layout", "p50_ms")
    job = JOB | {"dtype": "bf16", "batch": 2}
    row = worker.make_row(job, {"status": "ok", "p50_ms": 20.0}, ability, columns)
    # 2 volumes of 2 GMAC at 1 TFLOP/s take 8 ms; 2 volumes of 3 million numbers of 2 bytes at 10 GB/s take 1.2 ms
    assert row["floor_ms"] == pytest.approx(9.2)
    assert row["volumes_per_s"] == pytest.approx(100) and row["matrix_peak_share"] == pytest.approx(0.4)
    unknown = worker.make_row(job, {"status": "not run: emulated"}, ability | {"peak_tflops": {}}, columns)
    assert unknown["floor_ms"] is None
    unmeasured = worker.make_row(job, {"status": "out of memory"}, ability, columns)
    assert unmeasured["floor_ms"] == pytest.approx(9.2) and unmeasured["repeats"] is None


# ---- timing --------------------------------------------------------------------------------------------------------


def test_a_summary_is_that_of_numpy():
    times = list(np.random.default_rng(0).gamma(2, 3, 30))
    summary = timing.summary_of(times)
    assert summary["p50_ms"] == pytest.approx(np.median(times)) and summary["mean_ms"] == pytest.approx(np.mean(times))
    for share in (90, 99):
        assert summary[f"p{share}_ms"] == np.percentile(times, share, method="inverted_cdf")
    assert summary["sd_ms"] == pytest.approx(np.std(times, ddof=1)) and summary["repeats"] == 30


def test_passes_take_the_inputs_in_turn_and_end_with_the_time(monkeypatch):
    taken = []
    images = [torch.zeros(1), torch.ones(1)]
    times = timing.latencies_ms(lambda image: taken.append(image.item()), images, repeats=8)
    assert len(times) == 8 and taken[-8:] == [0, 1] * 4 and len(taken) > 8  # some before them do not count
    slow = timing.latencies_ms(lambda image: time.sleep(0.02), images, repeats=50, max_seconds=0.01, min_repeats=3)
    assert len(slow) == 3 and min(slow) >= 20


@pytest.mark.parametrize(("tflops", "largest"), [(1e-4, 256), (1e-3, 512), (1.0, 2048)])
def test_no_product_is_begun_that_would_take_too_long(monkeypatch, tflops, largest):
    """A device whose speed is known, and a clock that stands still but for its products."""
    sides = []

    def latencies(run, images, **_):
        sides.append(images[0].shape[0])
        return [2 * sides[-1] ** 3 / (1e9 * tflops)]

    monkeypatch.setattr(profiling, "latencies_ms", latencies)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1.0)
    assert profiling.matrix_peak_tflops("float32", torch.device("cpu")) == pytest.approx(tflops)
    assert sides[-1] == largest


def test_the_unavoidable_traffic_is_counted_by_hand():
    network = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.LeakyReLU(),
                            nn.Conv3d(8, 2, 1, stride=2))  # fmt: skip
    voxels = 6**3
    first = voxels * (4 + 8) + 4 * 8 * 27 + 8
    second = voxels * 8 + voxels // 8 * 2 + 8 * 2 + 2
    assert profiling.unavoidable_values(network, (1, 4, 6, 6, 6)) == first + second


NAMES = {
    "aten::mkldnn_convolution": "convolution",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolution",
    "aten::native_layer_norm": "norm",
    "triton_red_fused_native_layer_norm_3": "norm",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "aten::addmm": "linear",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "linear",
    "aten::copy_": "layout copies",
    "void cudnn::engines_precompiled::nchwToNhwcKernel<float>": "layout copies",
    "aten::leaky_relu_": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_counted_as_what_they_are(name):
    assert profiling.category_of(name) == NAMES[name]


# ---- figures -------------------------------------------------------------------------------------------------------


def test_no_line_no_figure(tmp_path):
    row = {"model": "unet", "network": "unet", "engine": "eager", "dtype": "bf16", "batch": 1, "size": 32,
           "parameters": 4_800_000, "peak_gib": 1.0}  # fmt: skip
    path = tmp_path / "memory.png"
    other = row | {"size": 64, "parameters": 1_200_000}  # a network of another width: no line joins the two
    assert not figures.lines_over([row, other], "size", "peak_gib", "x", "y", path, "title")
    assert not figures.lines_over([row], "size", "peak_gib", "x", "y", path, "title") and not path.exists()
    assert figures.lines_over([row, row | {"size": 64}], "size", "peak_gib", "x", "y", path, "title")
    assert path.is_file()
