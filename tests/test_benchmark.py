"""The inference benchmark: what it measures, what it writes, what it refuses, and what becomes of a row that fails."""

import csv
import gzip
import json
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from torch import nn

import benchmark_inference
from models import build_model, timing
from models.benchmark import figures, jobs, profiling, table, worker
from models.benchmark.table import COLUMNS, Row
from models.benchmark.worker import DeviceSpeed, Job, Model, Result
from models.brats import MODALITIES
from models.cases import find_cases
from models.errors import InputError
from models.inference.availability import ENGINES
from models.inference.engines import with_attention
from models.inference.exports import FORMAT
from models.inference.predict import predict
from models.preprocessing import to_native, to_network
from models.runs import CHECKPOINT_FORMAT, load_model
from models.volumes import read_case

SCRIPT = "benchmark_inference.py"
SMALL = ("--models", "unet", "--size", 32, "--engines", "eager", "--layout", "contiguous", "--device", "cpu", "--out",
         "benchmark")  # fmt: skip
SETTING = {"engines": None, "sizes": [32], "batch_sizes": [1], "device": "cpu"}
SHARED = {"layout": "contiguous", "repeats": 5, "max_seconds": 10, "cache": ""}
UNET = Model("unet", "unet", {})
JOB = Job(model=UNET, engine="eager", dtype="float32", batch=1, size=32, device="cpu", parameters=4_800_000,
          macs=2_000_000_000, values=3_000_000, **SHARED)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run as a training script leaves it: an untrained U-Net, made for 32^3 voxels."""
    run = tmp_path_factory.mktemp("runs") / "first"
    run.mkdir()
    model = build_model("unet")
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}
    torch.save({"format": CHECKPOINT_FORMAT, "network": "unet", "config": config, "modalities": list(MODALITIES),
                "epoch": 1, "model": model.state_dict()}, run / "best.pt")  # fmt: skip
    (run / "config.json").write_text(json.dumps({"size": [32, 32, 32], "spacing_mm": 1.0}))
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
    (path,) = set((folder / "benchmark").glob("inference-*.csv")) - set((folder / "benchmark").glob("*-profile.csv"))
    return list(csv.DictReader(path.open(newline="")))


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


def test_what_this_machine_cannot_run_is_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr(jobs, "native_dtypes", lambda device: {torch.float32, torch.bfloat16})
    made = jobs.make_jobs([UNET], dtypes=None, **SETTING, **SHARED)
    assert {(job.engine, job.dtype) for job in made} == {
        (engine, dtype) for engine in ENGINES for dtype in ("float32", "bf16")
    }
    reasons = {job.engine: job.not_run for job in made if job.dtype == "float32"}
    assert reasons["cudagraph"] == "CUDA graphs need a CUDA device"
    assert reasons["fused"] == "the network has no attention" and reasons["eager"] is None
    assert worker.measure(replace(JOB, not_run="no reason")) == Result(status="not run: no reason")


def test_a_type_that_is_only_emulated_is_listed_and_runs_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(jobs, "native_dtypes", lambda device: {torch.float32})
    eager = SETTING | {"engines": ["eager"]}
    emulated = [job for job in jobs.make_jobs([UNET], dtypes=None, **eager, **SHARED) if job.dtype == "bf16"]
    assert [job.not_run for job in emulated] == ["emulated on this processor"]
    (asked,) = jobs.make_jobs([UNET], dtypes=["bf16"], **eager, **SHARED)
    assert asked.dtype == "bf16" and asked.not_run is None


def test_an_engine_that_nobody_named_may_be_unable_to_run():
    made = jobs.make_jobs([UNET], dtypes=["float32"], **SETTING, **SHARED)
    assert {job.engine for job in made} == {*ENGINES} and not made[0].not_run


def test_int8_is_listed_as_not_run_where_no_cases_can_calibrate_it(trained, monkeypatch):
    monkeypatch.setattr(jobs, "why_not", lambda *_: None)
    run = jobs.model_of(trained, [32], [1], "cpu")
    asked = SETTING | SHARED | {"engines": ["openvino"], "dtypes": ["int8"]}
    with pytest.raises(InputError, match=r"--dtypes int8: cannot run here: .*config\.json names no training cases"):
        jobs.make_jobs([run], **asked)
    monkeypatch.setattr(jobs, "calibration_images", lambda run: [])
    reasons = [job.not_run for job in jobs.make_jobs([UNET, run], **asked)]
    assert reasons == ["its weights are random: int8 is calibrated with the training cases of a run", None]


def test_monais_classes_run_beside_ours_with_the_same_weights():
    chosen = jobs.choose_models(None, [], feature_size=12, **SETTING)
    assert [model.name for model in chosen] == ["unet", "swinunetr", "monai-unet", "monai-swinunetr"]
    assert chosen[3].config == chosen[1].config == {"feature_size": 12}
    assert chosen[3].engines == ("eager", "fused", "compile")


def test_runs_of_different_width_each_have_their_own_of_monai(trained, tmp_path):
    wide = dict(torch.load(trained / "best.pt", weights_only=True))
    wide["config"] = wide["config"] | {"channels": [8, 16, 32, 64, 128]}
    for name in ("wide", "again"):
        shutil.copytree(trained, tmp_path / name)
        torch.save(wide, tmp_path / name / "best.pt")
    runs = [trained, tmp_path / "wide", tmp_path / "again"]
    chosen = jobs.choose_models(None, runs, feature_size=12, **SETTING)
    assert [model.source for model in chosen if model.name.startswith("monai-")] == [str(trained), str(runs[2])]


def test_a_network_that_monai_does_not_have_runs_without_it(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "full")
    settings = {"variant": "full-resolution", "channels": [4, 8], "convolutions": [1, 1]}
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save(checkpoint | {"config": checkpoint["config"] | settings}, tmp_path / "full" / "best.pt")
    chosen = jobs.choose_models(None, [tmp_path / "full"], feature_size=12, **SETTING)
    assert [model.source for model in chosen] == [str(tmp_path / "full")]
    without_attention = worker.Model("swinunetr", "swinunetr", {"use_attention": False})
    assert not worker.has_monai_twin(without_attention)


def test_results_go_to_the_repository_wherever_the_command_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    assert benchmark_inference.arguments().out == ROOT / "models/benchmark/results"


def test_a_row_that_fails_is_in_the_table_and_ends_with_status_3(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "measure_speed", lambda *_: DeviceSpeed({"float32": 1.0}, 10.0))
    monkeypatch.setattr(worker, "measure", lambda job: Result(status="failed: RuntimeError: a driver"))
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, SMALL[:-1]), str(tmp_path), "--dtypes", "float32"])
    assert benchmark_inference.main() == 3
    (path,) = tmp_path.glob("*.csv")
    assert [row.status for row in table.read_table(path)] == ["failed: RuntimeError: a driver"]
    assert "a driver" in capsys.readouterr().out


def test_the_last_line_is_json_and_names_the_table(first):
    folder, printed = first
    result = json.loads(printed.stdout.splitlines()[-1])
    assert (result["rows"], result["measured"]) == (4, 4)
    assert (folder / result["csv"]).is_file()
    assert result["fastest"]["unet-first"]["p50_ms"] == pytest.approx(float(rows_of(folder)[0]["p50_ms"]), rel=1e-4)


def test_the_figures_and_the_profile_are_there(first):
    folder, printed = first
    out = folder / "benchmark"
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


@pytest.mark.slow
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
    (("--dtypes", "int4"), "there is no 'int4'. There are: float32"),
    (("--dtypes", "fp16", "--device", "cpu"), "--dtypes fp16: cannot run here: fp16 is offered on CUDA only"),
    (("--engines", "eager", "--dtypes", "int8"), "--engines eager --dtypes int8: cannot run here: int8 is offered by"),
    (("--engines", "cudagraph", "--device", "cpu"), "--engines cudagraph: cannot run here: CUDA graphs need"),
    (("--models", "monai-swinunetr", "--engines", "aot"), "--engines aot: MONAI's networks run in eager, fused"),
    (("--size", "16"), "--size 16: unet cannot run on it (Expected more than 1 spatial element"),
    (("--size", "40"), "--size 40: unet needs a multiple of 16"),
    (("--case", "nowhere"), "nowhere: no such folder"),
    (("--run", "nowhere"), "nowhere: no such checkpoint"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_is_unusable_is_refused_in_one_line(tmp_path, options, message):
    flags = ("--models", "unet", "--size", 32, "--out", "benchmark", *options)
    result = run_script(SCRIPT, *flags, cwd=tmp_path, status=2)
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "benchmark").exists()


def test_a_run_of_another_size_is_refused(trained, tmp_path):
    result = run_script(SCRIPT, "--run", trained, "--size", 64, cwd=tmp_path, status=2)
    assert f"--size 64: {trained} was made for 32 x 32 x 32 voxels" in result.stderr


def test_a_run_that_does_not_say_how_its_cases_were_made_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "first")
    (tmp_path / "first/config.json").write_text(json.dumps({"size": [32, 32, 32]}))
    result = run_script(SCRIPT, "--run", "first", "--size", 32, cwd=tmp_path, status=2)
    assert "config.json: does not say how the cases" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_file_made_by_another_torch_is_refused(tmp_path):
    header = {"format": FORMAT, "torch": "2.0.1", "machine": "any"}
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("old/wrapper_metadata.json", json.dumps(header))
    result = run_script(SCRIPT, "--run", "old.pt2", cwd=tmp_path, status=2)
    assert "old.pt2: made for torch 2.0.1, and this is" in result.stderr and len(result.stderr.splitlines()) == 1


# ---- rows ----------------------------------------------------------------------------------------------------------

def test_a_row_that_cannot_be_allocated_is_out_of_memory(tmp_path):
    answer = worker.answer_to("row", asdict(replace(JOB, size=2**14, cache=str(tmp_path))))
    assert answer == {"status": "out of memory"}


def test_a_row_that_fails_says_why_wherever_the_command_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    result = worker.measure(replace(JOB, size=17, cache=str(tmp_path)))
    assert result.status.startswith("failed: RuntimeError: ")


def test_a_case_goes_to_a_label_map_with_the_spacing_of_the_run_and_the_labels_that_were_named(
    raw, trained, tmp_path, monkeypatch
):
    written = []
    monkeypatch.setattr("models.inference.predict.write_label_nifti", lambda path, label, _: written.append(label))
    shutil.copytree(trained, tmp_path / "coarse")
    (tmp_path / "coarse/config.json").write_text(json.dumps({"size": [32, 32, 32], "spacing_mm": 1.6}))
    model = jobs.choose_models(None, [tmp_path / "coarse"], feature_size=12, **SETTING)[0]
    folder = raw / "BraTS2021_00000"
    result = worker.measure_row(replace(JOB, model=model, cache=str(tmp_path), case=str(folder), labels="brats2023"))
    assert result.status == "ok" and result.load_ms > 0 and result.write_ms > 0
    volumes = read_case(find_cases(folder)[0])
    case = to_network(volumes.image, None, volumes.affine, 32, 1.6)
    expected = to_native(predict(load_model(trained)[0], case["image"]), case["geometry"]).argmax(0).numpy()
    assert (expected == 3).any()  # what BraTS 2021 writes as 4
    assert len(written) > 1 and all(np.mean(label == expected) >= 0.999 for label in written)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_process_that_the_system_killed_was_out_of_memory(monkeypatch):
    killed = subprocess.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    assert worker.answer_of(killed.returncode, "") == {"status": "out of memory: killed by the system"}
    assert worker.answer_of(3, "") == {"status": "failed: the process ended with exit status 3"}


def test_equal_labels_of_a_network_of_regions_are_counted():
    reference = torch.tensor([-2.0, 1.0, -1.0]).view(1, 3, 1, 1, 1).repeat(1, 1, 1, 1, 4)  # four voxels of oedema
    logits = reference.clone()
    logits[0, 1, 0, 0, 0] = 3.0  # surer, and still oedema
    logits[0, 0, 0, 0, 1] = 0.5  # a core now, though WT has the largest logit as before
    assert worker.parity(logits, reference) == {"max_logit_difference": 2.5, "label_agreement": 0.75}


@pytest.mark.parametrize(("network", "config"), [
    ("unet", {"channels": (8, 16, 32, 64, 128)}), ("swinunetr", {"feature_size": 12, "depths": (1, 1, 1, 1)}),
    ("swinunetr", {"feature_size": 12, "depths": (1, 1, 1, 1), "v2": True}),
])  # fmt: skip
def test_monais_class_as_it_comes_gets_our_weights(network, config):
    ours = build_model(network, **config).eval()
    twin = worker.monai_twin(ours)
    assert type(twin).__module__.startswith("monai.")
    assert not [module for module in twin.modules() if type(module).__module__.startswith("models.")]
    image = torch.rand(1, 4, 64, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), twin(image), rtol=1e-4, atol=1e-4)


def test_monais_attention_is_fused_in_a_copy_of_its_class():
    twin = worker.monai_twin(build_model("swinunetr", feature_size=12, depths=(1, 1, 1, 1)).eval())
    fused = with_attention(twin, "auto")
    flags = [[module.use_flash_attention for module in network.modules() if hasattr(module, "use_flash_attention")]
             for network in (twin, fused)]  # fmt: skip
    assert flags == [[False] * 4, [True] * 4]
    image = torch.rand(1, 4, 32, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(image), twin(image), rtol=1e-4, atol=1e-4)


def row_of(model: str, engine: str, **values) -> Row:
    circumstances = dict.fromkeys(("date", "commit", "device", "torch", "command"), "")
    known = {"network": model.split("-")[-1], "dtype": "float32", "batch": 1, "size": 64, "status": "ok"}
    return Row(model=model, engine=engine, **circumstances | known | values)


def test_ratios_are_to_monais_class_of_the_same_width_size_and_batch():
    def row(model, engine, p50_ms, batch=1, parameters=4):
        return row_of(model, engine, p50_ms=p50_ms, batch=batch, parameters=parameters)

    rows = [row("monai-swinunetr", "eager", 100.0), row("swinunetr", "fused", 20.0), row("swinunetr", "fused", 30.0, 2),
            row("swinunetr", "fused", 30.0, parameters=8), row("monai-swinunetr", "eager", 300.0, parameters=8),
            row("monai-unet", "compile", 1.0), row("monai-unet", "eager", 12.0), row("unet", "eager", 3.0)]  # fmt: skip
    ratios = [row.times_faster_than_monai_eager for row in table.with_ratios(rows)]
    assert ratios == [1.0, 5.0, None, 10.0, 1.0, 12.0, 1.0, 4.0]


def test_a_row_has_the_floor_of_its_batch_and_type():
    speed = DeviceSpeed({"float32": 0.5, "bf16": 1.0}, 10.0)
    circumstances = dict.fromkeys(("date", "commit", "device", "torch", "command"), "")
    job = replace(JOB, dtype="bf16", batch=2)
    row = table.make_row(job, Result(status="ok", p50_ms=20.0), speed, circumstances)
    # 2 volumes of 2 GMAC at 1 TFLOP/s take 8 ms; 2 volumes of 3 million numbers of 2 bytes at 10 GB/s take 1.2 ms
    assert row.floor_ms == pytest.approx(9.2)
    assert row.volumes_per_s == pytest.approx(100) and row.matrix_peak_share == pytest.approx(0.4)
    unknown = table.make_row(job, Result(status="not run: emulated"), replace(speed, peak_tflops={}), circumstances)
    assert unknown.floor_ms is None
    unmeasured = table.make_row(job, Result(status="out of memory"), speed, circumstances)
    assert unmeasured.floor_ms == pytest.approx(9.2) and unmeasured.repeats is None


def test_committed_tables_are_read_and_written_without_a_change(tmp_path):
    committed = [path for path in benchmark_inference.RESULTS.glob("*.csv") if not path.stem.endswith("-profile")]
    assert committed
    for path in committed:
        with path.open(newline="") as file:
            assert tuple(csv.DictReader(file).fieldnames) == COLUMNS
        table.write_table(tmp_path / path.name, table.read_table(path))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


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


@pytest.mark.parametrize(("gb_s", "mib"), [(100.0, 256), (1.0, 128), (0.1, 32)])
def test_the_bandwidth_is_found_in_three_seconds_on_tensors_as_large_as_that_allows(monkeypatch, gb_s, mib):
    """A machine that hands out memory as slowly as it copies, and a clock that stands still for all else."""
    clock, sizes = [100.0], []

    def latencies(run, images, repeats, max_seconds, **_):
        sizes.append(images[0].nbytes)
        copy_s = 2 * sizes[-1] / (1e9 * gb_s)
        clock[0] += copy_s + max(copy_s, min(repeats * copy_s, max_seconds))
        return [1e3 * copy_s]

    monkeypatch.setattr(profiling, "latencies_ms", latencies)
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: clock[0])
    assert profiling.copy_bandwidth_gb_s(torch.device("meta")) == pytest.approx(gb_s)
    assert sizes[-1] == mib * 2**20
    assert clock[0] - 100 <= 3


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
    row = row_of("unet", "eager", dtype="bf16", size=32, parameters=4_800_000, peak_gib=1.0)
    path = tmp_path / "memory.png"
    other = replace(row, size=64, parameters=1_200_000)  # a network of another width: no line joins the two
    assert not figures.lines_over([row, other], "size", "peak_gib", "x", "y", path, "title")
    assert not figures.lines_over([row], "size", "peak_gib", "x", "y", path, "title") and not path.exists()
    assert figures.lines_over([row, replace(row, size=64)], "size", "peak_gib", "x", "y", path, "title")
    assert path.is_file()
