"""What language models are worth on held-out text, and how much sooner a target writes with a draft beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewstep.data.dataset import Samples
from fewstep.evaluation.tables import Table, parameters
from fewstep.language.acceptance import measure_acceptance
from fewstep.language.costs import measure_costs
from fewstep.language.log_probs import response_lengths, token_log_prob
from fewstep.language.rollouts import rollout
from fewstep.language.speculative import Statistics, speculative_decode, tokens_per_call
from fewstep.language_models import LanguageModel
from fewstep.randomness import Rng

#: Texts that are read for the perplexity, prompts that are continued, and the tokens of a prompt.
TEXTS, PROMPTS, PROMPT = 200, 20, 8
#: Texts of which acceptance is measured: it needs more than timing does.
MEASURED = 100


def tokens_of(data: Samples, count: int) -> Tensor:
    """The first texts ``[N, L]`` of a data set; ValueError for data that are no tokens."""
    x = data.rows(slice(0, min(count, len(data)))).x
    if x is None or x.is_floating_point() or x.ndim != 2:
        raise ValueError(f"data '{data.name}' has samples {list(data.shape)}: a language model reads tokens [L]")
    return x


def counted_of(data: Samples, tokens: Tensor) -> Tensor:
    """Which of the first texts' ``tokens`` ``[N, L]`` count: those of the data's column "mask", all without."""
    columns = data.rows(slice(0, len(tokens))).columns
    return columns.get("mask", torch.ones_like(tokens, dtype=torch.bool))


@torch.no_grad()
def cross_entropy(model: LanguageModel, tokens: Tensor, mask: Tensor) -> float:
    """Nats a token that the ``mask`` ``[N, L]`` counts, the first one of each text never."""
    parts = zip(tokens.split(50), mask.split(50), strict=True)
    found = torch.cat([token_log_prob(model(part), part, counts) for part, counts in parts])
    return -float(found.double().sum() / response_lengths(mask).sum())


def language_table(models: Mapping[str, LanguageModel], test: Samples) -> Table:
    """Language models by name on held-out text."""
    tokens = tokens_of(test, TEXTS)
    mask = counted_of(test, tokens)
    rows, data = [], []
    for name, model in models.items():
        found, seconds, size = cross_entropy(model, tokens, mask), seconds_a_token(model, tokens), parameters(model)
        rows.append((name, f"{found:.4f}", f"{math.exp(found):.3f}", f"{size:,}", f"{1 / seconds:,.0f}"))
        data.append({"model": name, "nats": found, "parameters": size, "seconds_a_token": seconds})
    note = f"{len(tokens)} held-out texts of {tokens.shape[1]} tokens; tokens/s: one text, one token after the other"
    columns = ("model", "nats a token", "perplexity", "parameters", "tokens/s")
    return Table(f"{test.name}, held out", columns, tuple(rows), note, data)


def seconds_a_token(model: LanguageModel, tokens: Tensor) -> float:
    """The seconds that a token takes, written one after the other."""
    prompt = tokens[:1, : min(PROMPT, tokens.shape[1] - 1)]
    length = min(model.length, tokens.shape[1]) - prompt.shape[1]
    took = []
    for seed in range(3):
        start = time.perf_counter()
        rollout(model, prompt, Rng(seed, "timed"), length)
        took.append(time.perf_counter() - start)
    return min(took) / length


def speculative_table(
    target: LanguageModel, drafts: Mapping[str, LanguageModel], test: Samples, gammas: Sequence[int] = (1, 3, 7)
) -> Table:
    """Drafts by name beside a target: acceptance, tokens for each of the target's calls, and seconds."""
    tokens = tokens_of(test, max(PROMPTS, MEASURED))
    prompts = tokens[:, :PROMPT]
    length = min(target.length, *(draft.length for draft in drafts.values()), tokens.shape[1]) - PROMPT
    alone = seconds_a_token(target, tokens)
    rows, data = [], []
    for name, draft in drafts.items():
        alpha = measure_acceptance(target, draft, prompts[:MEASURED], Rng(0, "acceptance"), length).rate
        for gamma in gammas:
            costs = measure_costs(target, draft, prompts[0], gamma)
            told, seconds = decoded(target, draft, prompts[:PROMPTS], length, gamma)
            figures = {
                "acceptance": alpha, "block_efficiency": told.block_efficiency, "tau": tokens_per_call(alpha, gamma),
                "cost": costs.ratio, "formula": costs.speed_up(alpha), "with_blocks": costs.real_speed_up(alpha),
                "speed_up": alone / (seconds / told.tokens),
            }  # fmt: skip
            rows.append((name, str(gamma), *(f"{value:.3f}" for value in figures.values())))
            data.append({"draft": name, "gamma": gamma, **figures})
    note = (
        f"acceptance on {min(MEASURED, len(prompts))} texts of the target; tokens for each of its calls, counted and "
        "as tau says; c: what a call of the draft costs, in calls of the target; the speed-up that tau / (c gamma + 1) "
        "promises, the same with what it costs to read a block, and that of the clock"
    )
    columns = ("draft", "gamma", "acceptance", "tokens/call", "tau", "c", "formula", "with blocks", "speed-up")
    return Table("speculative decoding, sampled", columns, tuple(rows), note, data)


def decoded(
    target: LanguageModel, draft: LanguageModel, prompts: Tensor, length: int, gamma: int
) -> tuple[Statistics, float]:
    """What decoding after every prompt did, and the seconds of it all."""
    told = Statistics()
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        told += speculative_decode(target, draft, prompt, Rng(0, "prompt", i), length, gamma=gamma).statistics
    return told, time.perf_counter() - start
