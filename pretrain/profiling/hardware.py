"""Peak rates, memory and link rates of GPUs, from their manufacturers' data sheets.

Rates are dense: where a data sheet gives figures with structured sparsity, they are halved. NVIDIA
V100 (DS-08644), T4, A10, A30, A40, A100 (80 GB SXM), L4, L40, L40S, H100 (SXM, PCIe, NVL), H200 and HGX B200 data
sheets; GeForce and RTX GPU architecture white papers (Ampere GA102, Ada AD102); Amazon's EC2 G5 page for the A10G; AMD
Instinct MI300X data sheet (LE-84001).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates in TFLOP/s, dense; memory in GiB as marketed; links in GB/s per GPU and direction."""

    half: float
    """bf16 and fp16 (V100 and T4: fp16 alone)."""
    tf32: float
    """fp32 products with TF32; for GPUs without TF32, the fp32 rate."""
    fp32: float
    memory: float
    inside: float
    """Link to the other GPUs of the node: NVLink, Infinity Fabric or PCIe."""
    between: float = 12.5
    """Link to other nodes, with one common network adapter per GPU: 100, 200 or 400 Gbit/s."""


GPUS: dict[str, Gpu] = {
    "V100": Gpu(125, 15.7, 15.7, 32, 150),
    "T4": Gpu(65, 8.1, 8.1, 16, 16),
    "A10G": Gpu(70, 35, 35, 24, 32),
    "A10": Gpu(125, 62.5, 31.2, 24, 32),
    "A30": Gpu(165, 82, 10.3, 24, 100),
    "A40": Gpu(149.7, 74.8, 37.4, 48, 56),
    "A100": Gpu(312, 156, 19.5, 80, 300, 25),
    "RTX A6000": Gpu(154.8, 77.4, 38.7, 48, 56),
    "RTX 3090": Gpu(71, 35.6, 35.6, 24, 32),
    "RTX 4090": Gpu(165.2, 82.6, 82.6, 24, 32),
    "L4": Gpu(121, 60, 30.3, 24, 32),
    "L40": Gpu(181, 90.5, 90.5, 48, 32),
    "L40S": Gpu(362, 183, 91.6, 48, 32),
    "H100": Gpu(989.4, 494.7, 66.9, 80, 450, 50),
    "H100 PCIe": Gpu(756, 378, 51.2, 80, 64, 50),
    "H100 NVL": Gpu(835, 417.5, 60, 94, 300, 50),
    "GH200": Gpu(989.4, 494.7, 66.9, 96, 450, 50),
    "H200": Gpu(989.4, 494.7, 66.9, 141, 450, 50),
    "B200": Gpu(2250, 1125, 75, 180, 900, 50),
    "MI300X": Gpu(1307.4, 653.7, 163.4, 192, 448, 50),
}
"""GPUs by the words of torch's device name that identify them."""


def find_gpu(device_name: str) -> Gpu | None:
    """Returns the entry with the longest key whose words are all in `device_name`; None for an unknown GPU.

    Args:
        device_name: from `torch.cuda.get_device_name`, such as "NVIDIA H100 80GB HBM3".
    """
    words = set(device_name.replace("-", " ").split())
    known = [name for name in GPUS if set(name.split()) <= words]
    return GPUS[max(known, key=len)] if known else None


def peak_tflops(gpu: Gpu, precision: str, tf32: bool) -> float:
    """Returns the peak rate of matrix products in TFLOP/s.

    Args:
        gpu: the GPU.
        precision: "fp32", "bf16" or "fp16".
        tf32: whether fp32 products use TF32.
    """
    if precision != "fp32":
        return gpu.half
    return gpu.tf32 if tf32 else gpu.fp32
