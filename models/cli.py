"""What the command lines of the scripts share: argument types and exit statuses. Imports nothing heavy, so that
`--help` and a usage error answer at once."""

import argparse
import os
import re
import signal
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

from models.errors import InputError, InputWarning, one_line
from models.records import is_name

TORCHRUN_S = 3.0  # in which torchrun ends the others after one has ended with an error


def run(main):
    """Call `main()` and turn what it returns or raises into an exit status: 0 done, 2 unusable command or input (one
    line, no traceback unless --debug), 3 done but some cases failed, 128 + n ended by signal n (130: Ctrl-C); an error
    of ours is not caught (traceback, 1)."""
    warnings.showwarning = _show_warning
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        sys.exit(main())
    except KeyboardInterrupt as error:
        number, text = error.args or (signal.SIGINT, "Interrupted.")
        if text:
            print(text, file=sys.stderr)
        _kill_workers()
        sys.exit(128 + number)
    except BrokenPipeError:  # `| head` closed the pipe: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (InputError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        text = f"{error.filename}: {error.strerror}." if isinstance(error, OSError) and error.filename else str(error)
        _say_error(text)
        _end(2)
    except RuntimeError as error:
        if "--debug" in sys.argv or not _misses_a_process(error):
            raise
        reason = re.sub(r"^\[\S+\] ", "", one_line(error, 160))  # without the line of gloo's source
        _say_error(f"another process of this job has ended or no longer answers ({reason}). If it left no message, it "
                   "was probably killed. A training goes on with --resume.")  # fmt: skip
        time.sleep(TORCHRUN_S)  # torchrun names the first process that ends as the cause
        _end(1)


def _say_error(text: str):
    """Print an error, which is usually that of all processes: the others wait, and torchrun ends them meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which torchrun does so
    if os.environ.get("RANK", "0") != "0":
        time.sleep(TORCHRUN_S)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)  # a file name can hold any character
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr, flush=True)


def _end(status: int):
    _kill_workers()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(status)  # the threads of torch.distributed, which still wait for the others, abort an orderly end
    sys.exit(status)


def _kill_workers():
    """Workers that still read or score cases: Python would end them with a signal that they leave to this process, and
    wait for them for ever."""
    if "multiprocessing" in sys.modules:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports a killed worker as an error
        for worker in sys.modules["multiprocessing"].active_children():
            worker.kill()


def _misses_a_process(error: RuntimeError) -> bool:
    """Whether torch.distributed raised this because a message from another process was missing: of gloo, only the text
    says so."""
    return "/gloo/" in str(error) or type(error).__name__.startswith("Dist")


def _show_warning(message, category, *where, show=warnings.showwarning, **more):
    if category is InputWarning:
        print(f"warning: {message}", file=sys.stderr)
    else:
        show(message, category, *where, **more)


def parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring followed by the flags with their defaults."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        """The docstring as it is, and the defaults of the flags that have one."""

        def _get_help_string(self, action):
            return action.help if action.default in (None, False) else super()._get_help_string(action)

    result = argparse.ArgumentParser(description=docstring, formatter_class=Formatter)
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def positive_int(text: str) -> int:
    return _number(text, int, lambda value: value > 0, "a whole number above 0")


def natural(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more")


def positive_float(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def non_negative_float(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number, 0 or more")


def fraction(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def folder_name(text: str) -> str:
    if not is_name(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a single folder")
    return text


def fold_name(text: str) -> int | str:
    return text if text == "all" else natural(text)


def _number(text, kind, fits, wanted):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def add_device_arguments(parser):
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
                        help="half-precision arithmetic; auto: bf16, else fp16, on CUDA; on a CPU bf16 if it "
                             "multiplies it and that is faster for training, else off")


def usable_cpus() -> int:
    """The processors that this process may run on, of which a job on a shared machine often has only some, divided by
    the processes that torchrun started beside it."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def add_engine_argument(parser):
    # The names of models.inference.availability.ENGINES, which cannot be imported here: it needs torch.
    parser.add_argument("--engine", default="auto",
                        choices=("auto", "eager", "fused", "compile", "cudagraph", "aot", "onnx", "openvino",
                                 "openvino-int8"),
                        help="what runs the network; auto: OpenVINO if it is installed, measured to be faster on "
                             "this CPU, and worth the half minute of making it, else the modules; openvino-int8: the "
                             "network rounded to 8 bits, calibrated with the training cases of the run: faster, and "
                             "not quite as it was trained")


# ---- training flags ------------------------------------------------------------------------------------------------


def add_training_arguments(parser: argparse.ArgumentParser):
    """The flags that every training script has."""
    _add_data_arguments(parser.add_argument_group("data"))
    _add_optimisation_arguments(parser.add_argument_group("optimisation"))
    _add_runtime_arguments(parser.add_argument_group("runtime and output"))


def _add_data_arguments(group):
    group.add_argument("data", nargs="?", type=Path, default=Path("data/preprocessed_tensors"), metavar="DATA",
                       help="folder made by preprocess_brats.py")
    group.add_argument("--fold", type=fold_name, metavar="K|all",
                       help="train and validate on this cross-validation fold of splits.json; all: on every case that "
                            "is not for testing, for weights to share (nothing is validated: use their last.pt)")
    group.add_argument("--patch", type=positive_int,
                       help="train on random cubes with this side in voxels instead of whole cases, one per case and "
                            "epoch, every second one around a tumour voxel; cases of --size native need it")
    group.add_argument("--cache", choices=("auto", "device", "ram", "disk"), default="auto",
                       help="keep the cases on the GPU (on a CPU: in RAM), in RAM, or read them from disk in every "
                            "epoch; auto: the first of these that has twice the space that they take")
    group.add_argument("--workers", type=natural, default=min(4, usable_cpus()),
                       help="processes that read the cases ahead with --cache disk")
    group.add_argument("--flip-probability", type=fraction, default=0.5, help="of a mirror image, for each axis")
    group.add_argument("--rotate-probability", type=fraction, default=0.5, help="of a turn by 90, 180 or 270 degrees")
    group.add_argument("--noise-probability", type=fraction, default=0.2, help="of Gaussian noise on the images")
    group.add_argument("--noise-sd", type=positive_float, default=0.1,
                       help="of that noise; an image goes from 0 to 1 or, where it was preprocessed with --normalize "
                            "zscore, has the standard deviation 1")
    group.add_argument("--augmentation", choices=("basic", "strong"), default="basic",
                       help="basic: those above; strong: also random scales, rotations, deformations, contrasts, blur "
                            "and bias fields, for few cases and many epochs")
    group.add_argument("--copy-paste", type=fraction, default=0.0,
                       help="probability that a case gets the tumour of another training case pasted in")


def _add_optimisation_arguments(group):
    group.add_argument("--regions", action="store_true",
                       help="learn the overlapping regions TC, WT and ET, with a sigmoid each, instead of the "
                            "labels, with a softmax")
    group.add_argument("--epochs", type=positive_int, default=200, help="passes over the training cases")
    group.add_argument("--batch-size", type=positive_int, default=1, help="cases per step and process")
    group.add_argument("--accumulate", type=positive_int, default=1,
                       help="steps whose gradients make one update: a larger batch in the same memory")
    group.add_argument("--learning-rate", type=positive_float, default=3e-3, help="peak, after the warm-up")
    group.add_argument("--warmup", type=fraction, default=0.05, help="share of the updates before the peak")
    group.add_argument("--weight-decay", type=non_negative_float, default=1e-5, help="of AdamW")
    group.add_argument("--clip", type=positive_float, default=1.0, help="largest gradient norm")
    group.add_argument("--ema", type=fraction, default=0.0,
                       help="validate, test and keep an exponential moving average of the weights, with this "
                            "decay per update, such as 0.99; 0: the weights themselves")
    group.add_argument("--seed", type=natural, default=0, help="of the weights, the order and the augmentation")


def _add_runtime_arguments(group):
    add_device_arguments(group)
    group.add_argument("--deterministic", action="store_true",
                       help="two runs on one machine are equal to the last bit, on a GPU too, where it costs speed")
    group.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps")
    group.add_argument("--run-name", type=folder_name,
                       help="folder below models/<network>/results/ (default: the date and time)")
    group.add_argument("--init", metavar="RUN",
                       help="start from the weights of this run of the same script (its folder, or a checkpoint; or "
                            "unet, swinunetr: those that come with the project; unet-heads, swinunetr-heads: those "
                            "of them that have seen no patient), not from random ones; flags of the network that are "
                            "not given are those of that run")
    group.add_argument("--resume", action="store_true",
                       help="go on with the run of this name from its last.pt; --epochs may be more than before, flags "
                            "that affect speed alone may differ, and so may the number of processes, and with it "
                            "--batch-size and --accumulate if the effective batch size stays the same")
    group.add_argument("--save-minutes", type=positive_float, default=10.0,
                       help="write last.pt this often within an epoch, too: what a crash costs at most; Ctrl-C, "
                            "SIGTERM and SIGUSR1 save at once")


def settings_of(args: argparse.Namespace, kind: type):
    """A dataclass of this kind, each field filled from the flag of the same name."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})
