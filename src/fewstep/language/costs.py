"""What a call costs: the ratio between draft and target, without which an acceptance says nothing about seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.language.speculative import speed_up, tokens_per_call
from fewstep.language_models import LanguageModel


@dataclass(frozen=True)
class Costs:
    """Seconds of processor time, with caches: of a token that the ``target`` reads, of one that the ``draft`` reads,
    and of the ``block`` of ``gamma`` drafted tokens and one more that the target reads at once."""

    target: float
    draft: float
    block: float
    gamma: int

    @property
    def ratio(self) -> float:
        """c, what a call of the draft costs of one of the target."""
        return self.draft / self.target

    def speed_up(self, alpha: float) -> float:
        """How many times as fast as the target alone, by the formula, which takes a block for as cheap as a token."""
        return speed_up(alpha, self.gamma, self.ratio)

    def real_speed_up(self, alpha: float) -> float:
        """The same with what a block costs."""
        seconds = self.gamma * self.draft + self.block
        return tokens_per_call(alpha, self.gamma) * self.target / seconds


@torch.no_grad()
def measure_costs(target: LanguageModel, draft: LanguageModel, prompt: Tensor, gamma: int, repeats: int = 20) -> Costs:
    """The least of some ``repeats`` of each, taken in turn, after a prompt ``[L]``; on a device that computes behind
    the processor's back these are no costs."""
    models = (target, draft, target)
    states = [model.extend(prompt[None], model.begin())[1] for model in models]
    reads = [prompt[None, -1:], prompt[None, -1:], prompt[None, -1:].expand(1, gamma + 1)]
    best = [float("inf")] * 3
    for _ in range(repeats):
        for i, (model, state, tokens) in enumerate(zip(models, states, reads, strict=True)):
            began = time.process_time()
            model.extend(tokens, state)
            best[i] = min(best[i], time.process_time() - began)
    one, drafted, block = best
    return Costs(one, drafted, block, gamma)
