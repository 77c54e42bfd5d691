"""What a run will do, as pure numbers: the learning rate at each step, and the peak rate of the card. No torch here."""

import math

# Dense 16-bit matrix products with 32-bit accumulation, in TFLOPS, and the number of multiprocessors (SMs), which
# tells apart two cards of one name. GeForce: the vendor's architecture whitepapers (GA102 2020, Ada 2022, Blackwell
# 2025) and, for cards they leave out, their rule: SMs x 512 FLOP a clock x boost clock. Others: vendor's datasheets.
PEAK_TFLOPS = {
    "RTX 3060": (28, 25.5),
    "RTX 3060 Ti": (38, 32.4),
    "RTX 3070": (46, 40.6),
    "RTX 3070 Ti": (48, 43.5),
    "RTX 3080": (68, 59.5),
    "RTX 3080 Ti": (80, 68.2),
    "RTX 3090": (82, 71.0),
    "RTX 3090 Ti": (84, 80.0),
    "RTX 4060": (24, 30.2),
    "RTX 4060 Ti": (34, 44.1),
    "RTX 4070": (46, 58.3),
    "RTX 4070 SUPER": (56, 71.0),
    "RTX 4070 Ti": (60, 80.2),
    "RTX 4070 Ti SUPER": (66, 88.2),
    "RTX 4080": (76, 97.5),
    "RTX 4080 SUPER": (80, 104.4),
    "RTX 4090": (128, 165.2),
    "RTX 5060": (30, 38.4),
    "RTX 5060 Ti": (36, 47.4),
    "RTX 5070": (48, 61.7),
    "RTX 5070 Ti": (70, 87.9),
    "RTX 5080": (84, 112.6),
    "RTX 5090": (170, 209.5),
    "A10": (72, 125.0),
    "A100": (108, 312.0),
    "H100": (132, 989.0),  # SXM; the PCIe card has 114 SMs
    "H200": (132, 989.0),
    "L4": (58, 121.0),
    "L40S": (142, 362.0),
}
FORM_FACTORS = ("SXM4", "PCIE", "PCIe", "HBM3", "40GB", "80GB", "24GB", "16GB", "12GB", "8GB")


def peak_flops(name, sms=None):
    """FLOP/s of a card by the name that its driver gives ("NVIDIA GeForce RTX 4070"), or None if it is not known.

    The whole name has to fit, so that a "RTX 4070 Laptop GPU" is not taken for a RTX 4070, and so has the number of
    multiprocessors, if given: an unknown card has no MFU, never a wrong one.
    """
    words = [w for w in name.replace("-", " ").split() if w not in ("NVIDIA", "GeForce", *FORM_FACTORS)]
    row = PEAK_TFLOPS.get(" ".join(words))
    if row is None or (sms is not None and sms != row[0]):
        return None
    return row[1] * 1e12


def learning_rate(step, config):
    """The rate of the step that follows `step` steps: linear warm-up, then the schedule, min_lr at its end and after.

    config.lr_schedule: "cosine", "linear", or "wsd" (warm-up, stable, decay: the rate stays at its peak until the
    linear decay of the last `decay_iters` steps, Hu et al. 2024, arXiv 2404.06395).
    """
    peak, floor = config.learning_rate, config.min_lr
    if not config.decay_lr:
        return peak
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    if step >= end:
        return floor
    if config.lr_schedule == "wsd":
        return floor + (peak - floor) * min(1.0, (end - step) / (end - decay_start(config)))
    share = (step - config.warmup_iters) / (end - config.warmup_iters)
    if config.lr_schedule == "linear":
        return floor + (peak - floor) * (1 - share)
    return floor + 0.5 * (1 + math.cos(math.pi * share)) * (peak - floor)


def decay_start(config):
    """The step at which the decay of a "wsd" schedule begins: a fifth of the run before its end, if not given."""
    end = config.lr_decay_iters or config.max_iters
    return end - (config.decay_iters or max(1, end // 5))
