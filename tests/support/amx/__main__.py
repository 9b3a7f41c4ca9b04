"""Runs a command of this Python on an emulated CPU with AMX: `python -m tests.support.amx -- -m pytest tests/contract`.

oneDNN, cpuinfo and ONNX Runtime then choose their kernels for a Xeon with AMX, whose instructions emulator.c computes.
Needs Linux, gcc, binutils and a CPU with avx512_bf16. Nothing outside of the folder build/amx is written.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build" / "amx"
FLAGS = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-ftls-model=initial-exec"]
FLAGS += [f"-m{feature}" for feature in ("avx512f", "avx512bw", "avx512vl", "f16c")]
LIBRARIES = (
    ("torch", "lib/libtorch_cpu.so", ("dnnl::impl::cpu::", "Xbyak::")),
    ("torch", "lib/libc10.so", ("cpuinfo_x86",)),
    ("onnxruntime", "capi/onnxruntime_pybind11_state.*.so", ()),
)
"""Package, file, and beginnings of the functions whose questions about the CPU are answered; () for all functions."""
CODE = {"cpuid": b"\x0f\xa2", "xgetbv": b"\x0f\x01\xd0"}


def missing() -> str | None:
    """Returns why this machine cannot run the emulator; None if it can."""
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return "needs Linux on x86-64"
    if "amx_tile" in cpu:
        return "this CPU has AMX: run the tests as they are"
    if not {"avx512_bf16", "avx512vl", "avx512bw"} <= set(cpu):
        return "needs a CPU with avx512_bf16"
    absent = [tool for tool in ("gcc", "nm", "objdump") if not shutil.which(tool)]
    return f"needs {', '.join(absent)} (packages gcc and binutils)" if absent else None


def build() -> Path:
    """Compiles emulator.c unless it is built already, and returns the shared library."""
    source = HERE / "emulator.c"
    code = b"".join(file.read_bytes() for file in sorted(HERE.glob("*.[ch]")))
    key = hashlib.sha256(code + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = BUILD / f"emulator-{key}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", *FLAGS, "-o", str(fresh), str(source), "-ldl"], check=True)
        fresh.replace(library)
    return library


def list_sites() -> Path:
    """Writes the addresses of the instructions to replace, once per version of the libraries; returns the file."""
    found = [
        (file.resolve(), names)
        for package, pattern, names in LIBRARIES
        if (spec := importlib.util.find_spec(package)) and spec.origin
        for file in sorted(Path(spec.origin).parent.glob(pattern))
    ]
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns, names) for file, names in found]
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    listing = BUILD / f"sites-{key}.tsv"
    if not listing.exists():
        rows = [
            f"{file}\t{name[0]}\t{address:x}\n"
            for file, names in found
            for name, address in (_in_functions(file, names) if names else _disassembled(str(file)))
        ]
        fresh = listing.with_suffix(f".{os.getpid()}")
        fresh.write_text("".join(rows), encoding="utf-8")
        fresh.replace(listing)
    return listing


def _disassembled(file: str, *options: str) -> Iterator[tuple[str, int]]:
    """Yields name and address of each cpuid and xgetbv instruction that the disassembler finds."""
    command = ["objdump", "-d", "--no-show-raw-insn", *options, file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout
        for line in process.stdout:
            if (name := line.rsplit(None, 1)[-1] if line.strip() else "") in CODE:
                yield name, int(line.split(":")[0], 16)


def _in_functions(file: Path, names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yields the instructions within functions of such names. Only functions with the bytes of one are disassembled."""
    command = ["nm", "-C", "-n", "-S", "--defined-only", str(file)]
    functions = []
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        match line.split(" ", 3):
            case [start, size, "t" | "T" | "w" | "W", name] if len(size) == 16 and name.startswith(names):
                functions.append((int(start, 16), int(size, 16)))
    text, shift = file.read_bytes(), _text_shift(file)
    starts = [start for start, _ in functions]
    candidates = set()
    for code in CODE.values():
        at = text.find(code)
        while at >= 0:
            place = bisect.bisect_right(starts, at + shift) - 1
            if place >= 0 and at + shift < sum(functions[place]):
                candidates.add(functions[place])
            at = text.find(code, at + 1)
    for start, size in sorted(candidates):
        raw = BUILD / f"function.{os.getpid()}"
        raw.write_bytes(text[start - shift : start - shift + size])
        options = ("-D", "-b", "binary", "-m", "i386:x86-64", f"--adjust-vma={start:#x}")
        yield from _disassembled(str(raw), *options)
        raw.unlink()


def _text_shift(file: Path) -> int:
    """Returns address − offset in the file of the section .text."""
    listing = subprocess.run(["objdump", "-h", "-j", ".text", str(file)], check=True, capture_output=True, text=True)
    fields = next(line.split() for line in listing.stdout.splitlines() if " .text " in line)
    return int(fields[3], 16) - int(fields[5], 16)


def environment(counts: Path) -> dict[str, str]:
    """Returns the variables under which a process and its children run emulated."""
    return {
        "LD_PRELOAD": str(build()),
        "AMX_SITES": str(list_sites()),
        "AMX_COUNTS": str(counts),
        "XDG_CACHE_HOME": str(BUILD / "cache"),  # results of checks with emulated kernels are not those of this CPU
    }


def totals(counts: Path) -> dict[str, int]:
    """Adds up the emulated instructions of all processes that ended by themselves."""
    total: dict[str, int] = {}
    for line in counts.read_text(encoding="utf-8").splitlines() if counts.exists() else ():
        for field in line.split("\t")[1:]:
            name, _, number = field.partition("=")
            total[name] = total.get(name, 0) + int(number)
    return total


def main() -> int:
    """Runs the command and prints what was emulated."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.amx", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", nargs="+", metavar="ARGUMENT", help="arguments of Python, after --")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"amx: skipped: {reason}", file=sys.stderr)
        return 0
    counts = BUILD / f"counts.{os.getpid()}.tsv"
    variables = environment(counts)
    code = subprocess.run([sys.executable, *arguments.command], env={**os.environ, **variables}).returncode
    total = totals(counts)
    counts.unlink(missing_ok=True)
    print("amx: emulated " + (", ".join(f"{number:,} {name}" for name, number in total.items() if number) or "nothing"))
    if not code and not sum(number for name, number in total.items() if name.startswith("tdp")):
        print("amx: the command computed nothing with AMX", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
