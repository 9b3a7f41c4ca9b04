"""Tests, agreement with the CPU, speed, memory and a profile of one GPU; writes OUT.json and OUT.md.

    benchmarks/gpu.sh                                 # on a GPU, about 8 minutes
    benchmarks/gpu.sh --device cpu --steps 1 --quick  # rehearsal without a GPU

Each part has a name, can be chosen with --parts, and is skipped with its reason where something is missing. A part that
fails is reported with its error and the exit code is 1; the other parts run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import train_step
from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch
from pretrain.config import Config
from pretrain.interfaces.frames import StepContext
from pretrain.nn.attention_patterns import AttentionContext, Pattern, flex_mask, pattern_attention
from pretrain.train_module import TrainModule, build_model
from tests.support import contract_cases

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}
"""Largest relative difference of a loss to that of the CPU in fp32."""
PARTS = ("tests", "agreement", "recipes", "attention", "layouts", "profile", "zero_2")
Rows = list[dict[str, Any]]


class Skipped(Exception):  # noqa: N818 - an outcome, not an error
    """A part cannot run here; the message has the reason."""


def main() -> int:
    """Runs the parts and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each model")
    parser.add_argument("--quick", action="store_true", help="small models and batches: a rehearsal, not a measurement")
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that have not begun by then are skipped")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu --steps 1 --quick is a rehearsal without one")
    ends = time.monotonic() + 60 * args.minutes
    report: dict[str, Any] = {"command": " ".join(sys.argv), "environment": environment(args.device)}
    print(report["environment"], flush=True)
    for part in args.parts:
        began = time.monotonic()
        report[part] = outcome(globals()[f"measure_{part}"], args) if began < ends else {"skipped": "out of time"}
        report[part]["seconds"] = round(time.monotonic() - began, 1)
        print(f"== {part}: {summary(report[part])}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(f"{args.out}.json and .md")
    return int(any("error" in report[part] or report[part].get("failed") for part in args.parts))


def outcome(measure: Callable[[argparse.Namespace], dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Returns the result of a part, the reason why it was skipped, or its error."""
    try:
        return measure(args)
    except Skipped as reason:
        return {"skipped": str(reason)}
    except Exception:
        return {"error": traceback.format_exc(limit=-6)}
    finally:
        if args.device == "cuda":
            torch.cuda.empty_cache()


def summary(part: dict[str, Any]) -> str:
    """Returns one line about a part."""
    for key in ("skipped", "error"):
        if key in part:
            return f"{key}: {part[key].strip().splitlines()[-1]}"
    return f"{len(part.get('rows', []))} rows, {part['seconds']} s" + "; FAILED" * bool(part.get("failed"))


def environment(device: str) -> dict[str, Any]:
    """Returns device, driver and versions."""
    names = ("torch", "torchaudio", "transformers", "deepspeed", "triton")
    found = {"date": time.strftime("%Y-%m-%d"), "device": train_step.machine(device), "python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"memory_gib": round(total / 2**30, 1), "free_gib": round(free / 2**30, 1)}
        found["cuda"] = torch.version.cuda or ""
    return found


def measure_tests(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    if args.device == "cpu":
        raise Skipped("the tests in tests/gpu need a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=240, check=False)
    return {"failed": run.returncode != 0, "output": run.stdout[-3000:]}


def measure_agreement(args: argparse.Namespace) -> dict[str, Any]:
    """Compares losses and gradients of every objective with those of the CPU in fp32, without dropout."""
    rows: Rows = []
    names = list(contract_cases.CASES)[:2] if args.quick else list(contract_cases.CASES)
    for name in names:
        for packed in (False, True):
            expected, reference = loss_and_gradient(name, "fp32", "cpu", packed)
            for precision in ("fp32", "bf16", "fp16") if args.device == "cuda" else ("fp32", "bf16"):
                loss, gradient = loss_and_gradient(name, precision, args.device, packed)
                cosine = float(torch.nn.functional.cosine_similarity(gradient, reference, dim=0))
                difference = abs(loss - expected) / abs(expected)
                row = {"objective": name, "packed": packed, "precision": precision, "difference": difference}
                rows.append(row | {"gradient_cosine": cosine, "within": difference <= TOLERANCE[precision]})
    return {"rows": rows, "failed": not all(row["within"] for row in rows)}


def loss_and_gradient(objective: str, precision: str, device: str, packed: bool) -> tuple[float, Tensor]:
    """Returns the loss of a tiny model and its gradient, flat, on the CPU in fp64."""
    module = contract_cases.make(objective, precision=precision).to(device).eval()
    module.model.encoder.packed = module.model.frontend.packed = packed
    batch, ctx = contract_cases.batch().to(device), StepContext(3, 5)
    plan = module.prepare(batch, ctx)
    loss, _ = module(batch, plan, plan.counts_K, ctx)
    loss.backward()
    grads = [weight.grad for weight in module.parameters() if weight.grad is not None]
    return float(loss.detach()), torch.cat([grad.detach().double().cpu().flatten() for grad in grads])


def measure_recipes(args: argparse.Namespace) -> dict[str, Any]:
    """Times a step of every recipe beside transformers and torchaudio (benchmarks/train_step.py)."""
    batch, seconds = (1, 1.0) if args.quick else (32, 15.0) if args.device == "cuda" else (4, 5.0)
    recipes = ["efficient_base"] if args.quick else ["all"]
    settings = {"batch": batch, "seconds": seconds, "warm_up": 0 if args.quick else 2, "recipes": recipes}
    settings |= {"precision": ("bf16",) if args.quick else train_step.PRECISIONS}
    settings |= {"compiled": "none" if args.quick else "peer"}
    return train_step.measure(argparse.Namespace(device=args.device, steps=args.steps, **settings))


def measure_attention(args: argparse.Namespace) -> dict[str, Any]:
    """Times forward and backward passes of attention over packed utterances, by each way of computing it."""
    heads, size = 12, 64
    lengths = (40, 25) if args.quick else tuple([375, 500, 250, 750] * 8)
    total, longest = sum(lengths), max(lengths)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows: Rows = []

    def add(name: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        q, k, v = (torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True) for _ in range(3))
        milliseconds = timed(lambda: attend(q, k, v).sum().backward(), args)
        rows.append({"kernel": name, "ms": milliseconds})

    row_shape = (1, heads, total, size)
    for name, pattern in (("full", Pattern()), ("chunks of 16, 8 before", Pattern(chunk=16, left_chunks=8))):
        context = AttentionContext(None, pattern, documents=lengths)
        add(f"{name}: blockwise", lambda q, k, v, c=context: pattern_attention(q, k, v, c), row_shape)
        if args.device == "cuda":
            flex = context._replace(flex=flex_mask(context, 1, total, torch.device(args.device)))
            add(f"{name}: FlexAttention", lambda q, k, v, c=flex: pattern_attention(q, k, v, c), row_shape)
    padded = (len(lengths), heads, longest, size)
    add("full, padded rows: SDPA", torch.nn.functional.scaled_dot_product_attention, padded)
    if args.device == "cuda" and importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        starts = torch.tensor([0, *lengths], device=args.device).cumsum(0).int()
        add(
            "full: varlen",
            lambda q, k, v: varlen_attn(q, k, v, starts, starts, longest, longest),
            (total, heads, size),
        )
    return {"rows": rows, "frames": total}


def measure_layouts(args: argparse.Namespace) -> dict[str, Any]:
    """Times steps on padded and packed batches and with each way of activation checkpointing, and their memory."""
    rows: Rows = []
    for recipe in ("efficient_base",) if args.quick else ("wav2vec2_base", "efficient_base", "best_rq_base"):
        for packed in (False, True):
            for checkpointing in ("none", "selective", "full"):
                engine = {"precision": "bf16", "packed": packed, "activation_checkpointing": checkpointing}
                module, batch = whole_model(recipe, engine, args)
                step = train_step.our_step(module, batch)
                with memory_peak(args.device) as peak:
                    milliseconds = timed(numbered(step), args)
                row = {"recipe": recipe, "packed": packed, "checkpointing": checkpointing, "ms": milliseconds}
                rows.append(row | {"audio_s_per_s": float(batch.lengths_B.sum()) / 16 / milliseconds} | peak)
    return {"rows": rows}


def measure_profile(args: argparse.Namespace) -> dict[str, Any]:
    """Lists the ten kernels with most time in steps of one recipe, and the share of time without any kernel."""
    module, batch = whole_model("efficient_base", {"precision": "bf16", "packed": True}, args)
    step = numbered(train_step.our_step(module, batch))
    step(), synchronise(args.device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(min(3, args.steps)):
            step()
        synchronise(args.device)
    on_gpu = args.device == "cuda"
    events = profiler.key_averages()
    cost = (lambda e: e.self_device_time_total) if on_gpu else (lambda e: e.self_cpu_time_total)
    rows = [{"kernel": e.key, "ms": cost(e) / 1e3, "calls": e.count} for e in sorted(events, key=cost)[-10:][::-1]]
    return {"rows": rows, "idle_share": idle_share(profiler) if on_gpu else None}


def idle_share(profiler: Any) -> float:
    """Returns the share of the time between the first and the last kernel in which no kernel ran."""
    cuda = torch.autograd.DeviceType.CUDA
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == cuda)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])


def measure_zero_2(args: argparse.Namespace) -> dict[str, Any]:
    """Times DeepSpeed's ZeRO-2 on one GPU beside the plain engine, and the collectives' share that kernels cover."""
    if args.device == "cpu":
        raise Skipped("the overlap of collectives and kernels needs a GPU")
    if importlib.util.find_spec("deepspeed") is None:
        raise Skipped("deepspeed is not installed")
    from pretrain.engines import distributed, make_engine

    world = distributed.join("cuda", 5)
    rows: Rows = []
    for engine in ({"name": "torch"}, {"name": "deepspeed", "zero_stage": 2}):
        config = recipe_config("wav2vec2_base", engine | {"precision": "bf16"}, args)
        runner = make_engine(config, build_model(config), world)
        batch = batch_of(args)

        def step(number: int, runner: Any = runner, batch: Batch = batch) -> None:
            runner.step([batch], StepContext(0, number), 1e-4)

        numbers = numbered(step)
        row = {"engine": engine["name"], "ms": timed(numbers, args)}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            numbers(), synchronise(args.device)
        rows.append(row | covered(profiler))
    distributed.leave()
    return {"rows": rows}


def covered(profiler: Any) -> dict[str, float]:
    """Returns the time of collectives, in ms, and the share of it in which other kernels ran."""
    cuda = torch.autograd.DeviceType.CUDA
    spans = [(e.time_range.start, e.time_range.end, e.name) for e in profiler.events() if e.device_type == cuda]
    ours = sorted((start, stop) for start, stop, name in spans if "nccl" not in name.lower())
    total = inside = 0.0
    for start, stop, name in spans:
        if "nccl" in name.lower():
            total += stop - start
            inside += sum(max(0.0, min(stop, end) - max(start, begin)) for begin, end in ours)
    return {"collectives_ms": total / 1e3, "covered_share": inside / total if total else 0.0}


def recipe_config(recipe: str, engine: dict[str, Any], args: argparse.Namespace) -> Config:
    """Returns a recipe's config, with a small encoder for a rehearsal."""
    values: dict[str, Any] = train_step.RECIPES[recipe] | {"data": {"shards": "none"}, "engine": engine}
    if args.quick:
        values = values | {"encoder": values["encoder"] | {"dim": 48, "layers": 2, "heads": 4, "ffn_dim": 96}}
        values["objective"] = values["objective"] | {"predict_layers": [1, 2], "relabel_layer": 1}
    return load(Config, values)


def batch_of(args: argparse.Namespace) -> Batch:
    """Returns utterances of different lengths."""
    rows, seconds = (2, 1.0) if args.quick else (32, 15.0) if args.device == "cuda" else (4, 5.0)
    whole = train_step.speech_batch(rows, seconds, "cpu")
    shares = torch.linspace(0.5, 1.0, rows)
    lengths_B = (shares * whole.wave_BT.shape[1]).long()
    wave_BT = whole.wave_BT * (torch.arange(whole.wave_BT.shape[1]) < lengths_B[:, None])
    return Batch(wave_BT, lengths_B, whole.keys, 0, targets=whole.targets).to(args.device)


def whole_model(recipe: str, engine: dict[str, Any], args: argparse.Namespace) -> tuple[TrainModule, Batch]:
    """Returns a recipe's model on the device, and a batch."""
    return build_model(recipe_config(recipe, engine, args)).to(args.device), batch_of(args)


def numbered(step: Callable[[int], Any]) -> Callable[[], None]:
    """Returns a function that calls `step` with 0, 1, 2 …"""
    count = iter(range(1 << 30))
    return lambda: (step(next(count)), None)[1]


def timed(run: Callable[[], Any], args: argparse.Namespace) -> float:
    """Returns the median time of a run in milliseconds, after one that is not counted."""
    run(), synchronise(args.device)
    taken = []
    for _ in range(args.steps):
        began = time.perf_counter()
        run(), synchronise(args.device)
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def memory_peak(device: str) -> Iterator[dict[str, float]]:
    """Yields a dict that has the peak of allocated GPU memory, `gib`, when the block has ended; empty on a CPU."""
    found: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device == "cuda":
        found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as tables."""
    lines = ["# One GPU", "", f"`{report['command']}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in report["environment"].items()), ""]
    for part in PARTS:
        if part not in report:
            continue
        found = report[part]
        lines += [f"## {part}", "", summary(found), ""]
        lines += [f"{name}: {show(found[name])}" for name in ("idle_share", "frames") if found.get(name) is not None]
        if rows := found.get("rows"):
            names = list(dict.fromkeys(name for row in rows for name in row))
            lines += ["", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
            lines += ["| " + " | ".join(show(row.get(name, "")) for name in names) + " |" for row in rows]
        lines += [""]
    return "\n".join(lines)


def show(value: Any) -> str:
    """Returns a value for a table cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
