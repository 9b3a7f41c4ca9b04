"""Checks the requirements of auricle on this machine; each finding has a remedy."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from launch.launchers.slurm import NO_CLUSTER
from pretrain.profiling.processor import instruction_sets

GIB = 1 << 30
Verdict = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Diagnosis:
    """One line of the report."""

    topic: str
    verdict: Verdict
    found: str
    remedy: str = ""
    needed: bool = True
    """Whether auricle requires it; otherwise it is optional."""


CHECKOUT = Path(__file__).resolve().parents[1]


def install(package: str) -> str:
    """Returns the command that installs a package: `make setup` in a checkout, pip otherwise."""
    return "make setup" if _in_checkout() else f"pip install {package}"


def _in_checkout() -> bool:
    return (CHECKOUT / "launch/setup/setup.sh").is_file()


def diagnose(folder: Path) -> Iterator[Diagnosis]:
    """Runs all checks and yields their findings; an exception in a check becomes a finding.

    Args:
        folder: Where runs would be written.
    """
    checks: tuple[tuple[str, Callable[[], Iterator[Diagnosis]]], ...] = (
        ("python", _python),
        ("packages", _packages),
        ("torch", _torch),
        ("operations", _operations),
        ("compilers", _compilers),
        ("codecs", _codecs),
        ("slurm", _slurm),
        ("memory", lambda: _resources(folder)),
    )
    for topic, check in checks:
        try:
            yield from check()
        except Exception as error:
            again = (
                "`make setup` installs auricle again" if _in_checkout() else "install it again from where you got it"
            )
            yield Diagnosis(topic, "broken", f"{type(error).__name__}: {error}", f"see the message; {again}")


def _python() -> Iterator[Diagnosis]:
    version = sys.version.split()[0]
    good = sys.version_info >= (3, 11)
    yield Diagnosis("Python", "ok" if good else "broken", f"{version} at {sys.executable}", "3.11 or newer is needed")


def _packages() -> Iterator[Diagnosis]:
    for package in ("deepspeed", "ray", "webdataset", "hydra-core", "tensorboard", "soundfile", "torchaudio"):
        try:
            yield Diagnosis(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Diagnosis(package, "missing", "not installed", install(package))
    optional = (
        ("transformers", "transformers", "export and parity tests"),
        ("jiwer", "jiwer", "word error rates of `auricle finetune` and `auricle evaluate`"),
        ("scikit-learn", "sklearn", "phone-normalised mutual information of units in `auricle evaluate`"),
        ("onnxruntime", "onnxruntime", "ONNX graphs, and voice activity detection with silero-vad"),
        ("s3fs", "s3fs", "shards in S3"),
    )
    for package, module, use in optional:
        known = importlib.util.find_spec(module) is not None
        found = metadata.version(package) if known else "not installed"
        yield Diagnosis(package, "ok" if known else "missing", found, f"for {use}: pip install {package}", needed=False)


def _torch() -> Iterator[Diagnosis]:
    import torch

    yield Diagnosis("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, {_cpu_features()}")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            yield Diagnosis(
                f"GPU {number}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {bf16}", needed=False
            )
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        driver = "with a driver" if shutil.which("nvidia-smi") else "no NVIDIA driver here"
        remedy = "training runs on the CPU; a GPU needs its driver and a CUDA build of torch"
        yield Diagnosis("GPU", "missing", f"{built}, {driver}", remedy, needed=False)
    sources = {"gloo": "comes with torch", "nccl": "comes with a CUDA build of torch"}
    for backend, use in (("gloo", "ranks on CPUs"), ("nccl", "ranks on GPUs")):
        there = torch.distributed.is_available() and torch.distributed.is_backend_available(backend)
        yield Diagnosis(backend, "ok" if there else "missing", use, sources[backend], needed=backend == "gloo")


def _cpu_features() -> str:
    known = instruction_sets()
    if not known:
        return "CPU features unknown"
    return ", ".join(name for name in ("avx2", "avx512f", "amx_bf16") if name in known) or "no AVX"


def _operations() -> Iterator[Diagnosis]:
    """Compares 16-bit operations of the shipped recipes with fp32 on each kind of device."""
    import torch

    from pretrain.profiling import operation_check

    devices = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    for device in devices:
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            n_right, odd = operation_check.survey(device, dtype)
            wrong = [result for result in odd if not result.right]
            shown = [f"{n_right} operations agree with fp32"]
            shown += [f"{v.operation}: error {v.direct:.2g} as it is, {v.error:.2g} by {v.route}" for v in odd]
            remedy = f"do not train with engine.precision={name} on {device}; a newer torch may be right"
            verdict: Verdict = "broken" if wrong else "ok"
            yield Diagnosis(f"{name} on {device}", verdict, "; ".join(shown), remedy, needed=False)


def _compilers() -> Iterator[Diagnosis]:
    remedy = (
        "pretraining does not need it; DeepSpeed compiles some options with it (CPU Adam for offload, fused Adam): {}"
    )
    for tool, package in (("g++", "apt-get install g++"), ("ninja", "pip install ninja")):
        path = shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        yield Diagnosis(tool, "ok" if path else "missing", path or "not found", remedy.format(package), needed=False)
    yield _deepspeed_ops()


def _deepspeed_ops() -> Diagnosis:
    """Lists the compiled operators of DeepSpeed that can be built here."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns on the terminal that it found no GPU
    try:
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        fit = sorted(name for name, builder in ALL_OPS.items() if builder.is_compatible(verbose=False))
    except Exception as error:  # an operator's own probe may fail in any way
        return Diagnosis("DeepSpeed ops", "missing", f"{type(error).__name__}: {error}", "not needed", needed=False)
    return Diagnosis(
        "DeepSpeed ops", "ok", ", ".join(fit) or "none can be built", "built when first used", needed=False
    )


def _codecs() -> Iterator[Diagnosis]:
    import soundfile

    formats = ", ".join(name for name in ("WAV", "FLAC", "OGG", "MP3") if name in soundfile.available_formats())
    yield Diagnosis("libsndfile", "ok", f"{soundfile.__libsndfile_version__}: {formats}")
    known = importlib.util.find_spec("av") is not None
    found = f"PyAV {metadata.version('av')}" if known else "not installed"
    remedy = "decodes what libsndfile cannot (m4a, webm, wma, g722 …): pip install av"
    yield Diagnosis("FFmpeg", "ok" if known else "missing", found, remedy, needed=False)


def _slurm() -> Iterator[Diagnosis]:
    path = shutil.which("sbatch")
    if path:
        done = subprocess.run(
            ["sinfo", "--noheader", "-o", "%P %D nodes %G"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
        )
        if done.returncode == 0:
            yield Diagnosis("SLURM", "ok", "; ".join(done.stdout.split("\n")).strip("; "), needed=False)
        else:
            found = f"{path} exists, but no cluster answers"
            yield Diagnosis("SLURM", "missing", found, NO_CLUSTER, needed=False)
    else:
        yield Diagnosis(
            "SLURM", "missing", "no sbatch", "only for a cluster: run auricle on its login node", needed=False
        )


def _resources(folder: Path) -> Iterator[Diagnosis]:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    enough = memory.available > 4 * GIB
    found = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}, {cores} cores"
    yield Diagnosis("memory", "ok" if enough else "missing", found, "the demo needs 4 GiB", needed=False)
    shared = Path("/dev/shm")
    if shared.exists():
        free = shutil.disk_usage(shared).free
        remedy = "Ray keeps blocks there and falls back to disk: mount a larger one (docker: --shm-size=4g)"
        yield Diagnosis(
            "/dev/shm", "ok" if free > GIB else "missing", f"{free / GIB:.1f} GiB free", remedy, needed=False
        )
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    found = f"{free / GIB:.0f} GiB free at {there}{'' if writable else ', not writable'}"
    good = writable and free > 5 * GIB
    yield Diagnosis("disk", "ok" if good else "missing", found, "a run needs some GiB: set runs= to another disk")
