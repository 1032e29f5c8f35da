"""What vendors and PyTorch say of some GPUs."""

from typing import NamedTuple

__all__ = ["GPUS", "GPU", "gpu_named"]

GIB = 2**30


class GPU(NamedTuple):
    """A card.

    Attributes:
        title: What people call it.
        memory: Bytes, as ``torch.cuda.get_device_properties`` tells them: less than on the box.
        bf16: Dense FLOP a second in bfloat16 or float16 with sums in float32: no sparsity.
        fp32: The same in float32 without TF32, which PyTorch does not use unless told.
    """

    title: str
    memory: int
    bf16: float
    fp32: float

    def peak(self, precision: str) -> float:
        """Dense FLOP a second in a precision of ``optim_wrapper``."""
        return self.fp32 if precision == "off" else self.bf16


GPUS = {
    # NVIDIA Ada GPU Architecture whitepaper, table of the RTX 4090; 24 GB.
    "rtx4090": GPU("RTX 4090", int(23.6 * GIB), 165.2e12, 82.6e12),
    # RTX A6000 datasheet: 309.7 with sparsity, half of it without; 48 GB.
    "a6000": GPU("A6000", int(47.5 * GIB), 154.8e12, 38.7e12),
    # A100 datasheet; 40 and 80 GB.
    "a100-40": GPU("A100 40 GB", int(39.4 * GIB), 312e12, 19.5e12),
    "a100-80": GPU("A100 80 GB", int(79.1 * GIB), 312e12, 19.5e12),
    # H100 SXM datasheet: 1,979 with sparsity, half of it without; 80 GB.
    "h100": GPU("H100 SXM", int(79.1 * GIB), 989e12, 67e12),
    # H200 datasheet: the H100's arithmetic; 141 GB.
    "h200": GPU("H200", int(139.8 * GIB), 989e12, 67e12),
}

# What drivers call them. Others of nearly the same name are slower: "NVIDIA H100 PCIe".
DEVICES = {
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def gpu_named(device: str) -> GPU | None:
    """The card that ``torch.cuda.get_device_name`` names, or None for one that is not listed."""
    return GPUS.get(DEVICES.get(device, ""))
