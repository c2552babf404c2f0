"""Engines: every one labels like the plain network, what cannot run says why, and no file serves other weights."""

import json
import subprocess
import sys
import time
import zipfile
from argparse import ArgumentParser
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import ROOT

from models import build_model, cli
from models.cases import find_cases
from models.device import DTYPES
from models.errors import InputError
from models.inference import availability, engines, exports
from models.inference.availability import ENGINES, why_not
from models.inference.engines import load_engine, load_exported
from models.inference.predict import Member, predict, segment, segment_case
from models.nifti import read_nifti
from models.preprocessing import to_native, to_network
from models.runs import checkpoint_of
from models.timing import stage_durations_ms
from models.volumes import read_case

CPU = torch.device("cpu")
SHAPE = (1, 4, 32, 32, 32)
needs_compiler = pytest.mark.skipif(
    why_not("aot", "float32", CPU, torch.nn.Identity()) is not None, reason="no C++ compiler on this machine"
)


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    return build_model("swinunetr", feature_size=12, depths=(1, 1, 1, 1)).eval()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return build_model("unet").eval()


@pytest.fixture(scope="module")
def image():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder for all tests of this file: what is compiled once is used again."""
    return tmp_path_factory.mktemp("engines")


def load(model, engine, cache, dtype="float32", layout="contiguous", **rest):
    return load_engine(model, engine, dtype, layout, SHAPE, CPU, cache, **{"fallback": False, **rest})


def agreement(model, engine, image) -> float:
    """Share of the voxels that the engine labels as the network itself does in float32."""
    with torch.no_grad():
        return (engine(image).argmax(1) == model(image).argmax(1)).float().mean().item()


# ---- the same labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "layout", "dtype", "least"), [
    ("eager", "contiguous", "float32", 0.999),
    ("eager", "channels-last-3d", "float32", 0.999),
    ("fused", "contiguous", "float32", 0.999),
    ("fused", "channels-last-3d", "float32", 0.999),
    ("eager", "contiguous", "bf16", 0.99),  # a pass takes seconds on a processor without bf16
    ("fused", "channels-last-3d", "bf16", 0.99),
])  # fmt: skip
def test_the_modules_label_alike_in_every_layout_and_type(swin, image, cache, engine, layout, dtype, least):
    loaded = load(swin, engine, cache, dtype, layout)
    logits = loaded(image)
    assert logits.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    with torch.no_grad():
        assert (logits.argmax(1) == swin(image).argmax(1)).float().mean() >= least


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999), ("bf16", 0.99)])
def test_the_unet_labels_alike(unet, image, cache, dtype, least):
    assert agreement(unet, load(unet, "eager", cache, dtype), image) >= least


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999), ("bf16", 0.99)])
def test_a_network_compiled_into_one_graph_labels_alike(swin, image, cache, dtype, least):
    torch._dynamo.utils.counters.clear()
    assert agreement(swin, load(swin, "compile", cache, dtype), image) >= least
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_unet_compiles_into_one_graph(unet, image):
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(unet, backend="eager", fullgraph=True)(image), unet(image))


@pytest.mark.parametrize("network", ["unet", "swin"])
@pytest.mark.parametrize(("engine", "dtype", "least"), [
    ("onnx", "float32", 0.999), ("openvino", "float32", 0.999), ("openvino", "bf16", 0.99),
])  # fmt: skip
def test_an_onnx_file_labels_alike_and_holds_no_operator_of_ours(
    request, image, tmp_path, network, engine, dtype, least
):
    model = request.getfixturevalue(network)
    if reason := why_not(engine, dtype, CPU, model):
        pytest.skip(reason)
    loaded = load(model, engine, tmp_path, dtype)
    other = torch.rand(SHAPE)
    first = loaded(image)
    assert agreement(model, loaded, image) >= least and agreement(model, loaded, other) >= least
    torch.testing.assert_close(loaded(image), first)  # which the runs in between did not overwrite
    import onnx

    (path,) = tmp_path.glob("*.onnx")
    assert {node.domain for node in onnx.load(path).graph.node} == {""}  # of the ONNX standard


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("engine", ["eager", "fused", "compile", "cudagraph"])
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999), ("tf32", 0.99), ("bf16", 0.99), ("fp16", 0.99)])
def test_engines_label_alike_on_cuda(swin, image, cache, engine, dtype, least):
    if why_not(engine, dtype, torch.device("cuda"), swin):
        pytest.skip(why_not(engine, dtype, torch.device("cuda"), swin))
    loaded = load_engine(swin, engine, dtype, "channels-last-3d", SHAPE, "cuda", cache, fallback=False)
    other = torch.rand(SHAPE)
    for given in (image, other, image):  # a recorded graph must take what it is given, not what it was recorded with
        with torch.no_grad():
            expected = swin(given).argmax(1)
        assert (loaded(given.cuda()).argmax(1).cpu() == expected).float().mean() >= least


def test_the_network_that_was_handed_over_stays_as_it_was(swin, image, cache):
    before = deepcopy(swin.state_dict())
    load(swin, "eager", cache, "bf16", "channels-last-3d")(image)
    for name, tensor in swin.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert all(module.attention == "auto" for module in swin.modules() if hasattr(module, "attention"))


def test_an_engine_stands_where_a_network_stands(swin, image, cache):
    torch.testing.assert_close(predict(load(swin, "fused", cache), image[0]), predict(swin, image[0]))


def test_another_shape_than_the_engine_was_made_for_is_refused(swin, cache):
    with pytest.raises(InputError, match=r"made for images of \(1, 4, 32, 32, 32\), not \(1, 4, 64"):
        load(swin, "eager", cache)(torch.rand(1, 4, 64, 64, 64))


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(swin, image, cache):
    """A .pt2 file and the logits that its engine returned when it was made."""
    if why_not("aot", "float32", CPU, swin):
        pytest.skip(why_not("aot", "float32", CPU, swin))
    logits = load(swin, "aot", cache)(image)
    return next(cache.glob("*.pt2")), logits


@pytest.mark.slow
def test_an_exported_network_labels_alike(swin, image, exported):
    assert agreement(swin, load_exported(exported[0]), image) >= 0.999


@pytest.mark.slow
def test_an_exported_file_holds_no_operator_of_ours(exported):
    with zipfile.ZipFile(exported[0]) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    assert not any(b"brats::" in content or b"swinunetr::" in content for content in contents)


@pytest.mark.slow
def test_an_exported_network_runs_without_the_model_code(image, exported, tmp_path):
    torch.save(image, tmp_path / "image")
    code = ("import sys, torch, torch._inductor\n"
            "run = torch._inductor.aoti_load_package(sys.argv[1])\n"
            "torch.save(run(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])\n"
            "assert not [name for name in sys.modules if name.split('.')[0] in ('models', 'monai')]")  # fmt: skip
    paths = [exported[0], tmp_path / "image", tmp_path / "logits"]
    command = [sys.executable, "-I", "-c", code, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits", weights_only=True), exported[1])


@pytest.mark.slow
def test_an_exported_file_is_used_again_and_never_for_other_weights(swin, image, cache, exported, monkeypatch):
    def compiles(*_, **__):
        raise RuntimeError("compiles again")

    monkeypatch.setattr(torch.export, "export", compiles)
    torch.testing.assert_close(load(swin, "aot", cache)(image), exported[1])
    other = deepcopy(swin)
    with torch.no_grad():
        other.out.conv.conv.bias[0] += 1e-3
    with pytest.raises(RuntimeError, match="compiles again"):
        load(other, "aot", cache)


def rewritten(path, target, **changes):
    """A copy of a .pt2 file with another header."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("wrapper_metadata.json"):
                content = json.dumps({**json.loads(content), **changes}).encode()
            copy.writestr(name, content)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [("torch", "2.0.1"), ("machine", "a toaster")])
def test_a_file_made_by_another_torch_or_machine_is_refused(exported, tmp_path, key, value):
    path = rewritten(exported[0], tmp_path / "other.pt2", **{key: value})
    with pytest.raises(InputError, match=f"other.pt2: made for {key} {value}, and this is .*Export it again"):
        load_engine(path)


def test_what_is_no_exported_file_is_refused(tmp_path):
    for name, content in (("text.pt2", b"not a zip"), ("cut.pt2", b"PK\x03\x04 cut short")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: damaged, or not a .pt2 file"):
            load_engine(tmp_path / name)
    with pytest.raises(InputError, match=r"none\.pt2: no such file"):
        load_engine(tmp_path / "none.pt2")


def test_an_export_that_labels_otherwise_is_refused_and_removed(swin, image, tmp_path):
    path = tmp_path / "wrong.pt2"
    path.touch()
    with pytest.raises(InputError, match="agrees with its original in"):
        exports.check_export(lambda image: -swin(image), swin, image, "float32", path)
    assert not path.exists()


# ---- what cannot run -----------------------------------------------------------------------------------------------


def test_what_a_cpu_cannot_run_says_why(swin, unet):
    assert "CUDA" in why_not("cudagraph", "float32", CPU, swin)
    assert "CUDA only" in why_not("eager", "fp16", CPU, swin) and "CUDA only" in why_not("eager", "tf32", CPU, swin)
    assert "no attention" in why_not("fused", "float32", CPU, unet)
    assert why_not("fused", "bf16", CPU, swin) is None


def test_a_machine_without_a_compiler_says_so(swin, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "g++" in why_not("compile", "float32", CPU, swin)
    assert why_not("fused", "float32", CPU, swin) is None


def test_a_machine_without_onnx_or_openvino_names_the_packages(swin, monkeypatch):
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    assert why_not("onnx", "float32", CPU, swin) == "pip install onnx onnxscript onnxruntime"
    assert why_not("openvino", "float32", CPU, swin) == "pip install onnx onnxscript openvino"
    assert why_not("openvino", "int8", CPU, swin) == "pip install onnx onnxscript openvino nncf"


def test_openvino_computes_on_a_cpu_and_in_types_that_it_multiplies(swin, monkeypatch):
    monkeypatch.setattr(availability, "find_spec", lambda name: True)
    assert "CPU" in why_not("openvino", "float32", torch.device("cuda"), swin)
    monkeypatch.setattr(availability, "native_dtypes", lambda device: {torch.float32})
    assert "bf16 only where the processor multiplies it" in why_not("openvino", "bf16", CPU, swin)
    assert why_not("openvino", "int8", CPU, swin) is None
    monkeypatch.setattr(availability, "native_dtypes", lambda device: {torch.float32, torch.bfloat16})
    assert why_not("openvino", "bf16", CPU, swin) is None


def test_int8_is_offered_by_openvino_only(swin):
    reasons = {why_not(engine, "int8", CPU, swin) for engine in ENGINES if engine != "openvino"}
    assert reasons == {"int8 is offered by the engine openvino only"}


@pytest.mark.parametrize(("engine", "dtype"), [("tensorrt", "float32"), ("eager", "int4")])
def test_an_engine_or_a_type_that_does_not_exist_is_refused(swin, engine, dtype, cache):
    with pytest.raises(InputError, match=r"there is no '(tensorrt|int4)'\. There are: "):
        load(swin, engine, cache, dtype, fallback=True)


def test_a_compiler_that_fails_is_replaced_loudly(swin, image, cache, monkeypatch, capsys):
    def crashes(_):
        raise RuntimeError("the compiler crashed")

    monkeypatch.setattr(engines, "_compiled", crashes)
    loaded = load(swin, "compile", cache, fallback=True)
    assert loaded.engine == "fused" and agreement(swin, loaded, image) >= 0.999
    log = capsys.readouterr().err
    assert "the compiler crashed" in log and "Taking fused in place of compile" in log
    with pytest.raises(RuntimeError, match="the compiler crashed"):
        load(swin, "compile", cache)


def test_a_network_without_attention_falls_back_to_its_modules(unet, image, cache, capsys):
    loaded = load(unet, "fused", cache, fallback=True)
    assert loaded.engine == "eager" and agreement(unet, loaded, image) == 1
    assert "no attention" in capsys.readouterr().err


def test_a_type_that_the_device_lacks_is_refused_with_every_engine(swin, cache):
    with pytest.raises(InputError, match="fp16 is offered on CUDA only"):
        load(swin, "compile", cache, "fp16", fallback=True)


# ---- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faster", ["contiguous", "channels-last-3d"])
def test_the_faster_layout_is_taken_and_remembered(unet, tmp_path, monkeypatch, faster):
    measured = []

    def latencies(engine, *_, **__):
        measured.append(engine.layout)
        return [1.0 if engine.layout == faster else 2.0]

    monkeypatch.setattr(engines, "latencies_ms", latencies)
    assert load(unet, "eager", tmp_path, layout="auto").layout == faster
    assert load(unet, "eager", tmp_path, layout="auto").layout == faster
    assert sorted(measured) == ["channels-last-3d", "contiguous"]


# ---- the modules or OpenVINO ---------------------------------------------------------------------------------------


@pytest.mark.skipif(why_not("openvino", "float32", CPU, torch.nn.Identity()) is not None, reason="no openvino")
@pytest.mark.parametrize("faster", ["openvino", "modules"])
def test_the_faster_of_the_modules_and_openvino_predicts_and_is_remembered(
    unet, image, tmp_path, monkeypatch, capsys, faster
):
    def in_turns(networks, *_, turns=3):
        if turns == 1:
            return {"modules": 2.0}
        assert networks["openvino"].engine == "openvino" and networks["modules"] is unet
        assert networks["openvino"].dtype == "float32"  # never int8: that is no longer the network as trained
        return {"openvino": 1.0 if faster == "openvino" else 3.0, "modules": 2.0}

    monkeypatch.setattr(engines, "_in_turns", in_turns)
    tmp_path = tmp_path / "cache"  # made when it is needed
    few, many = 29_999, 30_000  # passes of 2 ms: almost a minute, and a minute
    assert engines.choose_engine(unet, "auto", None, 32, CPU, few, tmp_path) is unet
    chosen = engines.choose_engine(unet, "auto", None, 32, CPU, many, tmp_path)
    assert engines.engine_name(chosen) == faster
    same = (predict(chosen, image[0]).argmax(0) == predict(unet, image[0]).argmax(0)).float().mean()
    assert same >= 0.999 and f"taking {faster}" in capsys.readouterr().err
    monkeypatch.setattr(engines, "_in_turns", None)  # nothing is measured again
    again = engines.choose_engine(unet, "auto", None, 32, CPU, many, tmp_path)
    assert engines.engine_name(again) == faster
    assert engines.choose_engine(unet, "auto", None, 32, CPU, few, tmp_path) is unet


@pytest.mark.skipif(why_not("openvino", "float32", CPU, torch.nn.Identity()) is not None, reason="no openvino")
@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_signal_after_openvino_sessions_were_freed_reaches_its_handler(tmp_path):
    """It ended the process while every session had a core of its own: the first one that was freed took the stack for
    signal handlers with it."""
    program = f"""
import os, signal
import openvino, openvino.opset13 as operations, torch
from pathlib import Path
from models.inference.exports import openvino_session
given = operations.parameter([1, 4, 8, 8, 8])
openvino.save_model(openvino.Model([operations.relu(given)], [given]), {str(tmp_path / "relu.xml")!r})
image = torch.rand(1, 4, 8, 8, 8)
first, second = (openvino_session(Path({str(tmp_path / "relu.xml")!r}), image, "float32") for _ in range(2))
del first, second
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "handled\n", result.stderr


def test_without_openvino_the_modules_predict(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    assert engines.choose_engine(unet, "auto", None, 32, CPU, 10**9, tmp_path) is unet


def test_the_fastest_is_that_of_most_turns(image):
    slow, fast = (lambda image, pause=pause: time.sleep(pause) or image for pause in (0.05, 0.0))
    median_ms = engines._in_turns({"slow": slow, "fast": fast}, image, None)
    assert median_ms["slow"] >= 50 and median_ms["fast"] < median_ms["slow"]  # however busy the machine


def test_an_engine_has_a_type_of_its_own_under_autocast(unet, image, cache):
    loaded = load(unet, "eager", cache)
    assert torch.equal(predict(loaded, image[0], torch.bfloat16), predict(loaded, image[0]))


def test_the_flag_names_every_engine():
    parser = ArgumentParser()
    cli.add_engine_argument(parser)
    (action,) = [action for action in parser._actions if action.dest == "engine"]
    assert action.choices == ("auto", *ENGINES, "openvino-int8")


# ---- from a checkpoint, and to a label map -------------------------------------------------------------------------


def test_one_function_from_a_checkpoint_to_logits(unet, image, tmp_path):
    torch.save(checkpoint_of(unet, "off", 1, None), tmp_path / "best.pt")
    loaded = load_engine(tmp_path, "eager", shape=SHAPE, cache=tmp_path / "engines")
    assert agreement(unet, loaded, image) == 1


@pytest.mark.parametrize(("spacing_mm", "scheme", "values"), [
    (1.0, "brats2021", (0, 1, 2, 4)), (1.6, "brats2024", (0, 1, 2, 3)), (1.0, "msd", (0, 2, 1, 3)),
])  # fmt: skip
def test_a_case_is_segmented_from_its_files_to_a_file_on_its_grid(unet, raw, tmp_path, spacing_mm, scheme, values):
    """With the spacing of the run and the label values of the data set, whatever its files are called."""
    case = find_cases(raw)[0]
    path = tmp_path / "prediction.nii.gz"
    setting = {"preprocessing": {"size": 32, "spacing_mm": spacing_mm}, "scheme": scheme, "device": CPU}
    _, spent_ms = stage_durations_ms(
        lambda on_stage: segment_case(case, Member(unet), path, **setting, on_stage=on_stage)
    )
    assert list(spent_ms) == ["load", "preprocess", "forward", "postprocess", "write"]
    assert all(duration > 0 for duration in spent_ms.values())
    volumes = read_case(case)
    written, affine = read_nifti(path)
    assert written.shape == volumes.image.shape[1:] and np.allclose(affine, volumes.affine)
    result = to_network(volumes.image, None, volumes.affine, 32, spacing_mm)
    expected = to_native(predict(unet, result["image"]), result["geometry"]).argmax(0).numpy()
    assert np.array_equal(written, np.array(values)[expected])


def test_an_image_in_network_space_is_segmented_as_it_is(unet, image):
    label = segment(image[0].numpy(), None, Member(unet), {}, CPU)
    with torch.no_grad():
        assert np.array_equal(label, unet(image)[0].argmax(0).numpy())


def test_the_benchmark_script_documents_every_engine_and_type():
    usage = (ROOT / "benchmark_inference.py").read_text().split('"""')[1]
    assert all(name in usage for name in (*ENGINES, *DTYPES))
