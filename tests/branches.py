"""The law of an algorithm that makes random choices, by walking through all of them; and small Markov tables."""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.language.speculative import Decoded


def table(seed: int, vocabulary: int = 4, order: int = 1, sharpness: float = 2.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(*[vocabulary] * (order + 1), generator=rng, dtype=torch.float64)
    return (sharpness * logits).softmax(-1)


class Branches:
    """A source of choices that replays some and takes the first possible one from there on; what it did not take, it
    leaves to be replayed."""

    def __init__(self, replay: list[int]) -> None:
        self.replay, self.taken, self.probability = replay, [], 1.0
        self.left: list[list[int]] = []

    def choice(self, n: int, weights: Tensor) -> Tensor:
        law = weights.double() / weights.double().sum()
        if len(self.taken) < len(self.replay):
            index = self.replay[len(self.taken)]
        else:
            index, *others = law.nonzero()[:, 0].tolist()
            self.left += [[*self.taken, other] for other in others]
        self.taken.append(index)
        self.probability *= float(law[index])
        return torch.tensor([index])


def walk(run: Callable[[Branches], Decoded]) -> dict[tuple[int, ...], float]:
    """The law of what comes out, by depth-first search over all choices."""
    waiting: list[list[int]] = [[]]
    law: dict[tuple[int, ...], float] = {}
    while waiting:
        branches = Branches(waiting.pop())
        out = tuple(run(branches).tokens.tolist())
        law[out] = law.get(out, 0.0) + branches.probability
        waiting += branches.left
    return law


def law_tensor(law: dict[tuple[int, ...], float], vocabulary: int, length: int) -> Tensor:
    out = torch.zeros([vocabulary] * length, dtype=torch.float64)
    for tokens, probability in law.items():
        out[tokens] = probability
    return out
