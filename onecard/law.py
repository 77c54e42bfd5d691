"""The loss to expect of a run before it starts, and other rules from the literature on scaling.

    expected, reason = expected_loss(config, rates)   # None and the reason where no figure supports an expectation

`law` is the scaling law of Hoffmann et al. 2022, shifted to meet a public run of GPT-2 on FineWeb. A newer recipe
counts as one that has seen MULTIPLIER times the tokens.
"""

import math
from typing import NamedTuple

from onecard.memory import network

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28  # Hoffmann et al. 2022, arXiv 2203.15556
ANCHOR = (124_475_904, 10.26e9, 3.2722)  # GPT-2 with AdamW on FineWeb by llm.c: parameters, tokens, val loss
BAND = 0.08  # error of the law, in nats
MULTIPLIER = {  # tokens of GPT-2's recipe that one token is worth, by network and optimizer: lowest, middle, highest
    ("gpt2", "adamw"): (1.0, 1.0, 1.0),
    ("qwen3", "muon"): (2.5, 4.5, 7.0),  # docs/recipe.md: between networks up to 1.9M and public runs at 124M
    ("qwen3", "normuon"): (2.5, 4.5, 7.0),
}
GPT2_BYTES = 4.67  # bytes of text in a token, with GPT-2's tokenizer on FineWeb
SMALLEST_VOCABULARY = 8192  # of those for which a loss is expected
FEWEST_A_PARAMETER = 10  # tokens; with the newer recipe
OTHER_VOCABULARY = 0.1  # added to the band, in nats per 4.67 bytes: that vocabularies differ little is an assumption


class Expected(NamedTuple):
    """The loss to expect, in nats per token of the run's tokenizer, and what it is probably off by at most."""

    loss: float
    band: float
    bits_per_byte: float | None  # None: the tokens are GPT-2's, for which the loss says as much
    parameters: int  # of the run
    tokens: int
    multiplier: float  # tokens of GPT-2's recipe that one token is worth
    token_size: float  # bytes of text in a token, over those in GPT-2's

    def __str__(self) -> str:
        bits = f" ({self.bits_per_byte:.3f} bits per byte)" if self.bits_per_byte else ""
        return f"{self.loss:.2f} +- {self.band:.2f}{bits}"

    @property
    def source(self) -> str:
        worth = "" if self.multiplier == 1 else f", a token counted as {self.multiplier:g}: docs/recipe.md"
        return f"law of Hoffmann et al. 2022{worth}"

    def gain(self, parameters: float, tokens: float) -> float:
        """By how many nats a token another network on other tokens would end lower, by the law."""
        worth = self.multiplier * self.token_size
        return self.token_size * (law(self.parameters, self.tokens * worth) - law(parameters, tokens * worth))


def law(parameters: float, tokens: float) -> float:
    """L(N, D) = E + A / N^0.34 + B / D^0.28 (Hoffmann et al. 2022), shifted to meet the anchor.

    The loss in nats per GPT-2 token of FineWeb after a finished schedule; N counts all parameters.
    """

    def loss(n, d):
        return E + A / n**ALPHA + B / d**BETA

    return loss(parameters, tokens) + ANCHOR[2] - loss(*ANCHOR[:2])


def best_size(parameters: float, tokens: float) -> tuple[float, float]:
    """(N, D) with the lowest loss by the law for the same FLOPs, which are taken as 6 x parameters x tokens.

    For every recipe, because whether a newer one moves the best size is not known.
    """
    product = parameters * tokens
    n = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * product ** (BETA / (ALPHA + BETA))
    return n, product / n


def usual_rate(parameters: float, optimizer: str = "adamw") -> float:
    """The learning rate that suits a network with so many parameters in blocks: AdamW's by Kaplan et al. 2020, D.6.

    Above 1.5 billion, their largest network, it stays the same: the formula falls below 0 at 12 billion. Muon's is 5.6
    times that: 3.6e-3 at 124M in the public speed runs (modded-nanogpt, track 3).
    """
    return (0.003239 - 0.0001395 * math.log(min(parameters, 1.5e9))) * (1 if optimizer == "adamw" else 5.6)


def critical_batch(loss: float) -> float:
    """Tokens of a step above which more help little (Kaplan et al. 2020, eq. 5.3); at twice this they cost compute."""
    return 2.1e8 / loss ** (1 / 0.21)


def critical_tokens(expected: Expected) -> float:
    """critical_batch in the run's own tokens."""
    return critical_batch(expected.loss / expected.token_size) / expected.token_size


def expected_loss(config, rates, epochs: float | None = None, bytes_per_token: float | None = None):
    """(Expected on FineWeb at the end of the run, None), or (None, the reason why there is no expectation).

    bytes_per_token: of text, in the dataset; needed where the tokens are not GPT-2's.
    """
    model, tokens = network(config), config.step_tokens * config.max_iters
    counts, vocab_size = model.parameter_counts(), model.config.vocab_size
    n, usual = counts["total"], usual_rate(counts["blocks"], config.optimizer)
    worth, gpt2s = MULTIPLIER.get((config.arch, config.optimizer)), 50257 <= vocab_size <= 51200
    token_size = 1.0 if gpt2s else (bytes_per_token or 0.0) / GPT2_BYTES
    gpt2_tokens = tokens * token_size  # of as many bytes
    end = config.lr_decay_iters or config.max_iters
    if config.from_pretrained:
        reason = f"the scaling law holds for random initial weights, not for those of {config.init_from}"
    elif worth is None:
        known = ", ".join(" with ".join(pair) for pair in MULTIPLIER)
        reason = f"the scaling law is for {known}, not for {config.arch} with {config.optimizer}"
    elif not gpt2s and vocab_size < SMALLEST_VOCABULARY:
        reason = f"the scaling law is for GPT-2's tokens and similar ones, not for a vocabulary of {vocab_size:,}"
    elif not token_size:
        reason = f"a vocabulary of {vocab_size:,} needs the bytes of text per token, which this dataset does not record"
    elif not 2e7 <= n <= 1.6e9:
        reason = f"the scaling law is not validated for {n / 1e6:,.0f}M parameters"
    elif not 5e8 <= gpt2_tokens * worth[1] <= 5e11:
        reason = f"the scaling law is not validated for {tokens / 1e6:,.1f}M tokens"
    elif worth[1] > 1 and gpt2_tokens < FEWEST_A_PARAMETER * n:
        reason = f"what the newer recipe gains is not known for less than {FEWEST_A_PARAMETER} tokens a parameter"
    elif (epochs or 0) > 4.05:
        reason = "the scaling law is for new tokens; beyond 4 epochs a repeated token is worth less"
    elif config.decay_lr and config.warmup_iters > 0.2 * config.max_iters:
        reason = f"the scaling law is for a short warm-up, not for one of {config.warmup_iters:,} steps"
    elif end > 1.05 * config.max_iters or rates[-1] > 0.3 * max(rates):
        reason = "the scaling law is for finished schedules; here the learning rate is still high at max_iters"
    elif not usual / 5 <= config.learning_rate <= 5 * usual:
        reason = f"the scaling law is for a good learning rate, about {usual:.1g}, not {config.learning_rate:g}"
    else:
        highest, middle, lowest = (law(n, gpt2_tokens * share) for share in worth)
        band = math.hypot(BAND, (highest - lowest) / 2) + (0.0 if gpt2s else OTHER_VOCABULARY)
        bits = None if gpt2s else middle / math.log(2) / GPT2_BYTES
        return Expected(middle * token_size, band * token_size, bits, n, tokens, worth[1], token_size), None
    return None, reason
