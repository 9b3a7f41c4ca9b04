"""Times one optimizer step of wav2vec2-base and HuBERT-base in auricle, transformers and torchaudio, and other recipes.

    python benchmarks/train_step.py                    # CPU, 4 × 5 s, fp32 and bf16
    python benchmarks/train_step.py --recipes all      # every objective against wav2vec2-base
    python benchmarks/train_step.py --device cuda --batch 32 --seconds 15

Audio and masks are the same for all. transformers runs eagerly and compiled by torch with static shapes, auricle
compiled with `--compiled all`. Prints audio-seconds per second and the ratio to the fastest mode of transformers and to
auricle's wav2vec2-base; on a GPU also audio-hours per GPU-hour and MFU, on a CPU the rate of each row's products beside
that of a large matrix product. transformers and torchaudio are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch
from pretrain.config import Config
from pretrain.interfaces.frames import StepContext
from pretrain.objectives.wav2vec2 import ContrastivePlan
from pretrain.profiling import flops, hardware
from pretrain.profiling.processor import model_name
from pretrain.self_supervision.masked_prediction import MaskedUnits
from pretrain.train_module import TrainModule, build_model

STEM = {"name": "waveform_conv"}
SCALED = STEM | {"gradient_scale": 0.1}
LAYER_NORM = STEM | {"norm": "layer", "normalize": True, "dropout": 0.0}
STACK = {
    "name": "transformer",
    "positions": "conv_stack",
    "conv_positions_kernel": 19,
    "conv_positions_depth": 5,
}
ROPE = {"name": "transformer", "norm": "pre", "positions": "rope", "attention_dropout": 0.0, "layer_drop": 0.0}
UNITS = {"labels": "units", "units": 500}
RECIPES: dict[str, dict[str, Any]] = {
    "wav2vec2_base": {"objective": {"name": "wav2vec2"}, "frontend": SCALED, "encoder": {"name": "transformer"}},
    "hubert_base": {
        "objective": {"name": "hubert"} | UNITS,
        "frontend": SCALED,
        "encoder": {"name": "transformer"},
    },
    "efficient_base": {
        "objective": {
            "name": "efficient",
            "relabel_step": 50_000,
            "relabel_layer": 7,
            "predict_layers": [6, 12],
        },
        "frontend": {"name": "log_mel", "normalize": "fixed"},
        "encoder": ROPE | {"attention": "chunked", "left_chunks": [8, 16, -1]},
    },
    "wavlm_base": {
        "objective": {"name": "wavlm"} | UNITS,
        "frontend": SCALED,
        "encoder": {"name": "transformer", "relative_bias": True},
    },
    "data2vec_base": {"objective": {"name": "data2vec"}, "frontend": LAYER_NORM, "encoder": STACK},
    "data2vec2_base": {"objective": {"name": "data2vec2"}, "frontend": LAYER_NORM, "encoder": STACK},
    "dinosr_base": {"objective": {"name": "dinosr"}, "frontend": LAYER_NORM, "encoder": STACK},
    "best_rq_base": {
        "objective": {"name": "best_rq"},
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "conformer", "layer_drop": 0.0},
    },
    "time_contrastive_base": {
        "objective": {
            "name": "time_contrastive",
            "slowest": 0.7,
            "fastest": 1.4,
            "segment_seconds": 1.0,
            "compared": "output",
        },
        "frontend": SCALED,
        "encoder": {"name": "transformer"},
    },
}
"""The models of conf/experiment, written out, since Hydra need not be there; a test compares them."""
FIRST_PHASE = {"efficient_base": 0.25}
"""Share of the updates before the model's own layer gives the units, 50,000 of 200,000; then a teacher listens, too."""
PRECISIONS = ("fp32", "bf16")
COMPILING_STEPS = 3
"""Further steps without a measurement: layer drop takes other paths than the first step, which compile as well."""
FIRST = ("wav2vec2_base", "hubert_base", "efficient_base")
CTX = StepContext(seed=0, step=0)


def speech_batch(size: int, seconds: float, device: str) -> Batch:
    """Returns noise with a slow envelope; its values do not affect the speed, its shape does."""
    generator = torch.Generator().manual_seed(0)
    wave_BT = 0.1 * torch.randn(size, int(seconds * 16_000), generator=generator)
    lengths_B = torch.full((size,), wave_BT.shape[1])
    units_BF = torch.randint(0, 500, (size, int(seconds * 50)), generator=generator)
    keys = tuple(f"utterance-{row}" for row in range(size))
    return Batch(wave_BT, lengths_B, keys, 0, targets={"units": units_BF}).to(device)


def ours(recipe: str, precision: str, device: str) -> TrainModule:
    values = RECIPES[recipe] | {"data": {"shards": "none"}, "engine": {"precision": precision}}
    return build_model(load(Config, values)).to(device)


def compile_module(module: torch.nn.Module) -> None:
    """Compiles the module for static shapes, without the messages on what cannot be compiled."""
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    torch._dynamo.reset()
    module.compile(dynamic=False)


def product_rate(precision: str) -> float:
    """Measures operations per second of CPU time of a large matrix product, the limit of a step's products."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    factors = torch.randn(2, 4096, 4096).to(kind)
    _, used = seconds_per_step(lambda _: float(torch.mm(factors[0], factors[1])[0, 0]), 5, 1, "cpu")
    return 2 * 4096**3 / used


def our_step(module: TrainModule, batch: Batch) -> Callable[[int], float]:
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, (0.9, 0.98), 1e-6, fused=True)

    def step(number: int) -> float:
        ctx = StepContext(0, number)
        plan = module.prepare(batch, ctx)
        loss, _ = module(batch, plan, plan.counts_K, ctx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.after_step(ctx)
        return float(loss.detach())

    return step


def their_inputs(module: TrainModule, batch: Batch, ctx: StepContext) -> dict[str, torch.Tensor]:
    """Converts auricle's mask and negatives to transformers' arguments."""
    plan = module.objective.prepare(module.model, batch, ctx)
    assert isinstance(plan, ContrastivePlan)
    B, F = plan.mask.mask_BF.shape
    frames_BM = plan.mask.flat_N[plan.mask.row_BM]
    negatives = torch.zeros(B, F, plan.negatives_BMK.shape[2], dtype=torch.int64, device=frames_BM.device)
    for row in range(B):
        valid = plan.mask.valid_BM[row]
        negatives[row, frames_BM[row, valid] - row * F] = frames_BM[row][plan.negatives_BMK[row, valid]]
    return {
        "input_values": batch.wave_BT,
        "mask_time_indices": plan.mask.mask_BF,
        "sampled_negative_indices": negatives,
    }


def theirs(device: str) -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

    # Dropouts of the release, which transformers' defaults are not: dropout of its feed-forward layers costs it time
    config = Wav2Vec2Config(layerdrop=0.05, activation_dropout=0.0, feat_proj_dropout=0.1, feat_quantizer_dropout=0.1)
    return Wav2Vec2ForPreTraining(config).to(device)


def their_step(model: Any, module: TrainModule, batch: Batch, precision: str) -> Callable[[int], float]:
    """Masks and negatives are drawn outside the time that counts."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.98), 1e-6, fused=True)
    inputs = their_inputs(module, batch, CTX)
    kind = batch.wave_BT.device.type

    def step(number: int) -> float:
        context = torch.autocast(kind, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with context:
            loss = model(**inputs).loss / inputs["mask_time_indices"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def torchaudio_hubert(device: str) -> Any:
    from torchaudio.models import hubert_pretrain_base

    return hubert_pretrain_base(num_classes=500).to(device)


def torchaudio_step(model: Any, module: TrainModule, batch: Batch, precision: str) -> Callable[[int], float]:
    """Returns a step with auricle's mask instead of one that torchaudio would draw in the measured time."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.98), 1e-6, fused=True)
    mask_BF = module.objective.prepare(module.model, batch, CTX).mask.mask_BF
    labels_BF = batch.targets["units"][:, : mask_BF.shape[1]]

    def masked(x_BFD: torch.Tensor, padding: object) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = model.mask_generator.mask_embedding.to(x_BFD.dtype)
        return torch.where(mask_BF[:, :, None], embedding, x_BFD), mask_BF

    model.mask_generator.forward = masked

    def step(number: int) -> float:
        kind = batch.wave_BT.device.type
        context = torch.autocast(kind, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with context:
            logits, _, penalty = model(batch.wave_BT, labels_BF)
            zeros = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            loss = torch.nn.functional.cross_entropy(logits.float(), zeros) + 10 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def contrastive_losses(module: TrainModule, model: Any, batch: Batch) -> tuple[float, float]:
    """Ours and theirs per masked frame with the same weights, mask and negatives, no dropout."""
    from pretrain.interop.hf_names import from_hugging_face, objective_from_hugging_face

    module.model.load_state_dict(from_hugging_face(model.state_dict(), module.model.state_dict()).weights)
    state = model.state_dict()
    copied = objective_from_hugging_face(state, module.objective.state_dict()).weights
    module.objective.load_state_dict(copied)
    module.eval(), model.eval()
    with torch.no_grad():
        plan = module.prepare(batch, CTX)
        _, metrics = module(batch, plan, plan.counts_K, CTX)
        mine = float(metrics["loss/contrastive"][0])
        other = float(model(**their_inputs(module, batch, CTX)).contrastive_loss)
    module.train(), model.train()
    count = float(plan.counts_K[0])
    return mine / count, other / count


def seconds_per_step(step: Callable[[int], float], steps: int, warm_up: int, device: str) -> tuple[float, float]:
    """Measures the median wall time of a step, and its CPU time over all threads, which a busy machine affects less."""
    wall, cpu = [], []
    for number in range(warm_up + steps):
        started, used = time.perf_counter(), time.process_time()
        step(number)
        if device == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return statistics.median(wall[warm_up:]), statistics.median(cpu[warm_up:])


def step_flops(module: TrainModule, batch: Batch) -> int:
    """Operations of matrix products, convolutions and attention, forward and backward; a teacher has no backward."""
    plan = module.prepare(batch, CTX)
    with flops.Counter() as counted:
        module(batch, plan, plan.counts_K, CTX)[0].backward()
    module.zero_grad()
    return int(counted.get_total_flops())


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{model_name()}, {torch.get_num_threads()} threads"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    batch = speech_batch(args.batch, args.seconds, args.device)
    audio = args.batch * args.seconds
    gpu = hardware.find_gpu(machine(args.device)) if args.device == "cuda" else None
    rows: list[dict[str, Any]] = []

    rates = {precision: product_rate(precision) for precision in PRECISIONS if args.device == "cpu"}

    def add(model: str, precision: str, step: Callable[[int], float], operations: int | None, warm_up: int = 0) -> None:
        taken, used = seconds_per_step(step, args.steps, args.warm_up + warm_up, args.device)
        row = {"model": model, "precision": precision, "step_s": taken, "audio_s_per_s": audio / taken}
        row["audio_s_per_cpu_s"] = audio / used
        if operations:
            row["gflop_per_audio_s"] = operations / audio / 1e9
        if operations and rates:
            row["product_rate_share"] = operations / used / rates[precision]
        if operations and args.device == "cuda":
            row["audio_h_per_gpu_h"] = audio / taken
            row["mfu"] = operations / taken / (gpu.half * 1e12) if gpu else None
        rows.append(row)
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))

    result: dict[str, Any] = {"machine": machine(args.device), "torch": torch.__version__, "rows": rows}
    result |= {"batch": args.batch, "seconds": args.seconds, "steps": args.steps}
    print(f"{result['machine']}, torch {torch.__version__}, {args.batch} × {args.seconds:g} s")
    if rates:
        result["product_flops_per_cpu_s"] = rates
        print("a product of 4096 × 4096:", ", ".join(f"{key} {rate / 1e12:.3f} TFLOP/s" for key, rate in rates.items()))
    try:
        peer: Any = theirs(args.device)
    except ImportError:
        peer = None
        print("transformers is absent: skipped")
    if peer is not None:
        module = ours("wav2vec2_base", "fp32", args.device)
        result["contrastive_losses"] = contrastive_losses(module, peer, batch)
        mine, other = result["contrastive_losses"]
        print(f"contrastive loss, same weights and masks: ours {mine:.7f}, transformers' {other:.7f}")
        for precision in PRECISIONS:
            add("transformers wav2vec2-base", precision, their_step(peer, module, batch, precision), None)
        if args.compiled != "none":
            compile_module(peer)
            for precision in PRECISIONS:
                step = their_step(peer, module, batch, precision)
                add("transformers wav2vec2-base, compiled", precision, step, None, warm_up=COMPILING_STEPS)
        del peer
    try:
        hubert: Any = torchaudio_hubert(args.device)
    except ImportError:
        hubert = None
        print("torchaudio is absent: skipped")
    for precision in PRECISIONS if hubert is not None else ():
        step = torchaudio_step(hubert, ours("hubert_base", "fp32", args.device), batch, precision)
        add("torchaudio hubert-base", precision, step, None)
    for recipe in RECIPES if "all" in args.recipes else args.recipes:
        for precision in args.precision:
            module = ours(recipe, precision, args.device)
            add(f"ours {recipe}", precision, our_step(module, batch), step_flops(module, batch))
            if recipe in FIRST_PHASE:
                assert isinstance(module.objective, MaskedUnits)
                module.objective.layer_fit.done.fill_(True)  # the units have no effect on the time
                module.objective.layer_fit.forget()
                assert module.objective.relabelled
                name = f"ours {recipe}, relabelled"
                add(name, precision, our_step(module, batch), step_flops(module, batch))
                rows.append(whole_run(rows[-2:], FIRST_PHASE[recipe]))
            if args.compiled == "all":
                operations = step_flops(module, batch)
                compile_module(module.model.encoder)
                name = f"{rows[-1]['model'].removesuffix(', whole run')}, compiled"
                add(name, precision, our_step(module, batch), operations, warm_up=COMPILING_STEPS)
    compare(rows)
    return result


def whole_run(phases: list[dict[str, Any]], share: float) -> dict[str, Any]:
    """Returns seconds, rates and operations of both phases together; the first has this share of the updates."""
    first, second = phases
    row = first | {"model": f"{first['model']}, whole run"}
    for key in row.keys() - {"model", "precision", "mfu"}:
        if key.endswith(("_per_s", "_per_cpu_s", "_per_gpu_h")) and not key.startswith("gflop"):
            row[key] = 1 / (share / first[key] + (1 - share) / second[key])
        else:
            row[key] = share * first[key] + (1 - share) * second[key]
    if first.get("mfu"):
        row["mfu"] = first["mfu"] * (row["gflop_per_audio_s"] / first["gflop_per_audio_s"])
        row["mfu"] *= row["audio_h_per_gpu_h"] / first["audio_h_per_gpu_h"]
    return row


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its ratios to the faster precision of each library and of our wav2vec2-base."""
    for peer in ("transformers", "torchaudio", "ours wav2vec2_base"):
        others = [row for row in rows if row["model"].startswith(peer)]
        for key, suffix in (("audio_s_per_s", ""), ("audio_s_per_cpu_s", "_cpu_time")) if others else ():
            best = max(row[key] for row in others)
            for row in rows:
                row[f"ratio_{peer.split()[-1]}{suffix}"] = row[key] / best
    for row in rows:
        ratios = [f"{name[6:]} {value:.2f}" for name, value in row.items() if name.startswith("ratio_")]
        print(f"{row['model']:<40} {row['precision']}  × the fastest mode of: {', '.join(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of ours; peers run in both"
    )
    parser.add_argument("--recipes", nargs="+", choices=("all", *RECIPES), default=FIRST)
    parser.add_argument(
        "--compiled", choices=("none", "peer", "all"), default="peer", help="also run compiled; all: our encoders, too"
    )
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
