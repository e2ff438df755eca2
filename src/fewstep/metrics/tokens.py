"""How good samples of tokens are: perplexity under a reference, and the entropy of the tokens beside it.

Perplexity alone can be bought: a sampler that repeats likely tokens has a low one.  The entropy of the tokens shows
the price, so :func:`token_quality` never gives one without the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metrics.estimates import Estimate

#: Log-probabilities ``[N]`` of sequences ``[N, L]``.
Reference = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenQuality:
    """``perplexity`` per token under the reference, with the standard error over samples; ``entropy`` in nats of all
    tokens together, and ``sequence_entropy``, the mean over samples of the entropy inside each: low when a sample
    repeats itself.  Compare all three with those of real data."""

    perplexity: Estimate
    entropy: float
    sequence_entropy: float
    n: int


def token_quality(x: Tensor, reference: Reference, tokens: int) -> TokenQuality:
    """Perplexity and entropies of samples ``[N, L]`` of ``0 .. tokens - 1``.

    Samples that the reference holds for impossible make the perplexity infinite.  ValueError for tokens out of range.
    """
    if x.ndim != 2 or len(x) == 0 or int(x.min()) < 0 or int(x.max()) >= tokens:
        raise ValueError(f"samples must be [N, L] of 0 .. {tokens - 1}, got shape {list(x.shape)}")
    nats = -reference(x).double() / x.shape[1]
    perplexity = float(nats.mean().exp())
    error = float(nats.std() / len(x) ** 0.5) * perplexity if len(x) > 1 else float("nan")
    counts = torch.nn.functional.one_hot(x, tokens).double().sum(1)
    return TokenQuality(
        Estimate(perplexity, error), float(_entropy(counts.sum(0))), float(_entropy(counts).mean()), len(x)
    )


def _entropy(counts: Tensor) -> Tensor:
    share = counts / counts.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1)


class NGram:
    """A model of the next token given the last ``order - 1``, with Witten-Bell smoothing down to a uniform law::

        p(c | h) = ( count(h c) + distinct(h) p(c | h') ) / ( count(h) + distinct(h) ),   h' = h without its oldest

    Made from the windows of a text ``[N, L]``; the first tokens of a window have shorter histories, as when samples are
    judged.
    """

    def __init__(self, windows: Tensor, tokens: int, order: int = 5) -> None:
        if order < 1:
            raise ValueError(f"order={order} must be at least 1")
        self.tokens, self.order = tokens, order
        self.counts: dict[tuple[int, ...], dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for window in windows.tolist():
            for i, token in enumerate(window):
                for start in range(max(0, i - order + 1), i + 1):
                    self.counts[tuple(window[start:i])][token] += 1
        self.totals = {history: (sum(seen.values()), len(seen)) for history, seen in self.counts.items()}

    def probability(self, token: int, history: tuple[int, ...]) -> float:
        """``p(token | history)``, looking at the last ``order - 1`` tokens of it."""
        p = 1 / self.tokens
        recent = history[max(0, len(history) - self.order + 1) :]
        for start in range(len(recent), -1, -1):
            known = self.totals.get(recent[start:])
            if known is None:
                break  # a longer history was not seen either
            total, distinct = known
            p = (self.counts[recent[start:]].get(token, 0) + distinct * p) / (total + distinct)
        return p

    def __call__(self, x: Tensor) -> Tensor:
        """Log-probabilities ``[N]`` of sequences ``[N, L]``, float64."""
        rows = [
            [self.probability(token, tuple(row[max(0, i - self.order + 1) : i])) for i, token in enumerate(row)]
            for row in x.tolist()
        ]
        return torch.tensor(rows, dtype=torch.float64).log().sum(1)
