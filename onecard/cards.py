"""Graphics cards: peak rate and memory of each, found by the name that a driver or a person gives it.

    found = card("NVIDIA GeForce RTX 4070")   # or "4070", "rtx4070"; None for a card that is not in the table
    found.tflops, found.gib

The one thing to know: a card that is not surely one of the table is unknown. A wrong peak would make every figure that
is derived from it wrong, without a sign.
"""

import difflib
import re
from typing import NamedTuple

import torch

# A row: multiprocessors (compute units of AMD's), which tell apart two cards of one name; TFLOPS of dense 16-bit matrix
# products with 32-bit accumulation; memory in GiB. Sources: NVIDIA's architecture whitepapers (Volta 2017, Turing 2018,
# GA102 2020, Ada 2022, Hopper 2022, Blackwell 2025) and datasheets; AMD's datasheets. For GeForce cards that the
# whitepapers leave out, their rule: multiprocessors x 512 FLOP a clock x boost clock. Laptop cards: the same rule with
# the largest boost clock of NVIDIA's comparison of laptop cards; a laptop with less power for the card is slower.
TABLE = {
    "RTX 2080 Ti": (68, 56.9, 11),
    "RTX 3050": (20, 18.2, 8),
    "RTX 3050 6GB": (18, 13.5, 6),
    "RTX 3060": (28, 25.5, 12),
    "RTX 3060 8GB": (28, 25.5, 8),
    "RTX 3060 Ti": (38, 32.4, 8),
    "RTX 3070": (46, 40.6, 8),
    "RTX 3070 Ti": (48, 43.5, 8),
    "RTX 3080": (68, 59.5, 10),
    "RTX 3080 12GB": (70, 61.3, 12),
    "RTX 3080 Ti": (80, 68.2, 12),
    "RTX 3090": (82, 71.0, 24),
    "RTX 3090 Ti": (84, 80.0, 24),
    "RTX 4060": (24, 30.2, 8),
    "RTX 4060 Ti": (34, 44.1, 8),
    "RTX 4060 Ti 16GB": (34, 44.1, 16),
    "RTX 4070": (46, 58.3, 12),
    "RTX 4070 SUPER": (56, 71.0, 12),
    "RTX 4070 Ti": (60, 80.2, 12),
    "RTX 4070 Ti SUPER": (66, 88.2, 16),
    "RTX 4080": (76, 97.5, 16),
    "RTX 4080 SUPER": (80, 104.4, 16),
    "RTX 4090 D": (114, 147.1, 24),
    "RTX 4090": (128, 165.2, 24),
    "RTX 5050": (20, 26.3, 8),
    "RTX 5060": (30, 38.4, 8),
    "RTX 5060 Ti": (36, 47.4, 8),
    "RTX 5060 Ti 16GB": (36, 47.4, 16),
    "RTX 5070": (48, 61.7, 12),
    "RTX 5070 Ti": (70, 87.9, 16),
    "RTX 5080": (84, 112.6, 16),
    "RTX 5090": (170, 209.5, 32),
    "RTX 3050 Laptop": (16, 14.3, 4),
    "RTX 3050 Ti Laptop": (20, 17.4, 4),
    "RTX 3060 Laptop": (30, 26.2, 6),
    "RTX 3070 Laptop": (40, 33.2, 8),
    "RTX 3070 Ti Laptop": (46, 35.0, 8),
    "RTX 3080 Laptop": (48, 42.0, 8),
    "RTX 3080 Laptop 16GB": (48, 42.0, 16),
    "RTX 3080 Ti Laptop": (58, 47.2, 16),
    "RTX 4050 Laptop": (20, 24.3, 6),
    "RTX 4060 Laptop": (24, 29.1, 8),
    "RTX 4070 Laptop": (36, 40.1, 8),
    "RTX 4080 Laptop": (58, 67.7, 12),
    "RTX 4090 Laptop": (76, 79.4, 16),
    "RTX 5060 Laptop": (26, 33.2, 8),
    "RTX 5070 Laptop": (36, 43.3, 8),
    "RTX 5070 Ti Laptop": (46, 52.3, 12),
    "RTX 5080 Laptop": (60, 70.3, 16),
    "RTX 5090 Laptop": (82, 90.7, 24),
    "RTX A4000": (48, 76.7, 16),
    "RTX A5000": (64, 111.1, 24),
    "RTX A6000": (84, 154.8, 48),
    "RTX 6000 Ada": (142, 364.2, 48),
    "RTX PRO 6000": (188, 503.8, 96),
    "T4": (40, 65.0, 16),
    "V100": (80, 125.0, 16),  # SXM2
    "V100 32GB": (80, 125.0, 32),
    "V100 PCIe": (80, 112.0, 16),
    "V100 PCIe 32GB": (80, 112.0, 32),
    "A10": (72, 125.0, 24),
    "A10G": (80, 70.0, 24),
    "A30": (56, 165.0, 24),
    "A40": (84, 149.7, 48),
    "A100": (108, 312.0, 40),
    "A100 80GB": (108, 312.0, 80),
    "L4": (58, 121.0, 24),
    "L40": (142, 181.0, 48),
    "L40S": (142, 362.0, 48),
    "H100": (132, 989.0, 80),  # SXM
    "H100 PCIe": (114, 756.0, 80),
    "H100 NVL": (132, 835.0, 94),
    "H200": (132, 989.0, 141),  # SXM
    "H200 NVL": (132, 835.0, 141),
    "GH200": (132, 989.0, 96),
    "B200": (148, 2250.0, 180),
    "MI300X": (304, 1307.4, 192),
    "RX 7900 XTX": (48, 122.8, 24),  # torch counts its 96 compute units in pairs
}
NO_BFLOAT16 = ("RTX 2080 Ti", "T4", "V100")  # before Ampere
# Parts of a driver's name that say nothing of speed or memory.
FILLERS = re.compile(
    r"\b(nvidia|geforce|tesla|quadro|amd|radeon|instinct|gpu|graphics|generation|blackwell|workstation|server|edition|"
    r"sxm\d?|oam|hbm\w*)\b"
)


class Card(NamedTuple):
    name: str
    sms: int  # multiprocessors
    tflops: float
    gib: int

    @property
    def has_bfloat16(self) -> bool:
        return not self.name.startswith(NO_BFLOAT16)


def card(name: str, sms: int | None = None, total_bytes: int | None = None) -> Card | None:
    """The card of a driver's name ("NVIDIA GeForce RTX 4070 Laptop GPU") or a short one ("4070"), or None.

    sms, total_bytes: of the card in this machine, if there is one: among cards of one name they decide which it is.
    """
    family, gib = split_name(name)
    names = (family, f"rtx {family}", f"rx {family}")
    rows = [Card(row, *numbers) for row, numbers in TABLE.items() if split_name(row)[0] in names]
    if sms:
        rows = [row for row in rows if row.sms == sms]
    if total_bytes:  # a driver shows up to a tenth less than what is sold
        return min(rows, key=lambda row: abs(row.gib * 2**30 - total_bytes), default=None)
    if gib:
        rows = [row for row in rows if row.gib == gib]
    return rows[0] if rows else None


def facts(config) -> dict:
    """What plan.plan is told of the card that config.gpu names: its name and dtype; {} without such a name."""
    found = card(config.gpu)
    auto = torch.bfloat16 if found and found.has_bfloat16 else torch.float16
    return dict(device=found.name, dtype=getattr(torch, config.dtype, auto)) if found else {}


def similar(name: str) -> list[str]:
    """Up to three cards of the table whose names are close to this one."""
    rows = {split_name(row)[0]: row for row in reversed(TABLE)}  # of variants with more memory, the first row
    family, _ = split_name(name)
    for words in (family, f"rtx {family}"):
        if near := difflib.get_close_matches(words, rows, n=3, cutoff=0.75):
            return [rows[words] for words in near]
    return []


def split_name(name: str) -> tuple[str, int | None]:
    """A card's name in lower case, without memory and fillers, and its memory in GB, if the name has it."""
    words = re.sub(r"\b(rtx|gtx|rx)(?=\d)", r"\1 ", re.sub(r"[-_()]", " ", name.lower()))
    words = re.sub(r"(?<=\d)(ti|super)", r" \1 ", words)
    words = words.replace("gh200 480gb", "gh200")  # of the processor's memory
    memory = re.search(r"\b(\d+) ?gb?\b", words)
    words = words.replace(memory[0], " ") if memory else words
    words = " ".join(FILLERS.sub(" ", words).split())
    words = words.replace("a100 pcie", "a100").replace("a30 pcie", "a30")  # no slower there
    return words, int(memory[1]) if memory else None
