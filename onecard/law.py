"""The loss to expect of a run before it starts, and other rules from the literature on scaling.

    loss, reason = expected_loss(config, rates)   # None and the reason where no figure supports an expectation

`law` is the scaling law of Hoffmann et al. 2022, shifted to meet a public run of GPT-2 on FineWeb.
"""

import math

from onecard.memory import network

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28  # Hoffmann et al. 2022, arXiv 2203.15556
ANCHOR = (124_475_904, 10.26e9, 3.2722)  # GPT-2 with AdamW on FineWeb by llm.c: parameters, tokens, val loss
BAND = 0.08  # error of the law, in nats
MULTIPLIER = {("gpt2", "adamw"): 1.0}  # tokens of GPT-2's recipe that one token is worth, by network and optimizer


def law(parameters: float, tokens: float) -> float:
    """L(N, D) = E + A / N^0.34 + B / D^0.28 (Hoffmann et al. 2022), shifted to meet the anchor.

    The loss in nats per GPT-2 token of FineWeb after a finished schedule; N counts all parameters.
    """

    def loss(n, d):
        return E + A / n**ALPHA + B / d**BETA

    return loss(parameters, tokens) + ANCHOR[2] - loss(*ANCHOR[:2])


def best_size(parameters: float, tokens: float) -> tuple[float, float]:
    """(N, D) with the lowest loss by the law for the same FLOPs, which are taken as 6 x parameters x tokens."""
    product = parameters * tokens
    n = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * product ** (BETA / (ALPHA + BETA))
    return n, product / n


def usual_rate(parameters: float, optimizer: str = "adamw") -> float:
    """The learning rate that suits a network with so many parameters in blocks: AdamW's by Kaplan et al. 2020, D.6.

    Above 1.5 billion, their largest network, it stays the same: the formula falls below 0 at 12 billion. Muon's is 5.6
    times that: 3.6e-3 at 124M in the public speed runs (modded-nanogpt, track 3).
    """
    return (0.003239 - 0.0001395 * math.log(min(parameters, 1.5e9))) * (5.6 if optimizer == "muon" else 1)


def critical_batch(loss: float) -> float:
    """Tokens of a step above which more help little (Kaplan et al. 2020, eq. 5.3); at twice this they cost compute."""
    return 2.1e8 / loss ** (1 / 0.21)


def expected_loss(config, rates, epochs: float | None = None) -> tuple[float | None, str | None]:
    """(val loss on FineWeb at the end of the run, None), or (None, the reason why there is no expectation)."""
    model, tokens = network(config), config.step_tokens * config.max_iters
    counts, vocab_size = model.parameter_counts(), model.config.vocab_size
    n, usual = counts["total"], usual_rate(counts["blocks"])
    multiplier = MULTIPLIER.get((config.arch, config.optimizer))
    end = config.lr_decay_iters or config.max_iters
    if config.from_pretrained:
        reason = f"the scaling law holds for random initial weights, not for those of {config.init_from}"
    elif multiplier is None:
        reason = f"the scaling law is for GPT-2's network with AdamW, not for {config.arch} with {config.optimizer}"
    elif not 50257 <= vocab_size <= 51200:
        reason = f"the scaling law is for GPT-2's tokens, not for a vocabulary of {vocab_size:,}"
    elif not 2e7 <= n <= 1.6e9:
        reason = f"the scaling law is not validated for {n / 1e6:,.0f}M parameters"
    elif not 5e8 <= tokens <= 5e11:
        reason = f"the scaling law is not validated for {tokens / 1e6:,.1f}M tokens"
    elif (epochs or 0) > 4.05:
        reason = "the scaling law is for new tokens; beyond 4 epochs a repeated token is worth less"
    elif config.decay_lr and config.warmup_iters > 0.2 * config.max_iters:
        reason = f"the scaling law is for a short warm-up, not for one of {config.warmup_iters:,} steps"
    elif end > 1.05 * config.max_iters or rates[-1] > 0.3 * max(rates):
        reason = "the scaling law is for finished schedules; here the learning rate is still high at max_iters"
    elif not usual / 5 <= config.learning_rate <= 5 * usual:
        reason = f"the scaling law is for a good learning rate, about {usual:.1g}, not {config.learning_rate:g}"
    else:
        return law(n, tokens * multiplier), None
    return None, reason
