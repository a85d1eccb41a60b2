"""What devices can do at best, for the model FLOPs utilisation (MFU).

The makers' figures for dense (not sparse) bfloat16 matrix products with float32 accumulation.
A device that is not listed has no figure: an MFU against a guessed peak would be worse than none.
"""

import re

_BF16_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    # The first pattern that is found in the device's name counts: variants stand before the rule.
    (r"\bA100\b", 312e12),
    (r"\bA800\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b", 989e12),
    (r"\bH800\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bH200\b", 989e12),
    (r"\bGH200\b", 989e12),
    (r"\bB200\b", 2.25e15),
    (r"\bGB200\b", 2.5e15),
    # GeForce and RTX cards: "Peak BF16 Tensor TFLOPS with FP32 Accumulate", dense, in the tables of
    # NVIDIA's white papers "Ampere GA102 GPU Architecture", "Ada GPU Architecture" and "RTX
    # Blackwell GPU Architecture". GeForce accumulates in float32 at half the rate.
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 6000 Ada\b", 364.2e12),
    (r"\bRTX 3090 Ti\b", 80e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bRTX 4070 Ti SUPER\b", 88.2e12),
    (r"\bRTX 4070 Ti\b", 80.2e12),
    (r"\bRTX 4080 SUPER\b", 104.4e12),
    (r"\bRTX 4080\b", 97.5e12),
    (r"\bRTX 4090\b(?! D)", 165.2e12),
    (r"\bRTX 5070 Ti\b", 87.9e12),
    (r"\bRTX 5080\b", 112.6e12),
    (r"\bRTX 5090\b(?! D)", 209.5e12),
    (r"\bMI210\b", 181e12),
    # One of the two dies of a card: each is a device. Some drivers name both models: unknown.
    (r"\bMI250X\b(?!\s*/)", 191.5e12),
    (r"(?<!MI250X/)\bMI250\b", 181e12),
    (r"\bMI300A\b", 980.6e12),
    (r"\bMI300X\b", 1307.4e12),
    (r"\bMI325X\b", 1307.4e12),
    (r"\bMI350X\b", 2.3e15),
    (r"\bMI355X\b", 2.5e15),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the device at its best; None if it is not known.

    A slice of a GPU (MIG) is not known: its name does not say how large it is in a reliable way.
    Nor is a GPU of a laptop, which runs as fast as its maker lets it.
    """
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", device_name):
        return None
    for pattern, flops in _BF16_PEAK_FLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return flops
    return None
