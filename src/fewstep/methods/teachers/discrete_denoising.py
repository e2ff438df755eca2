"""Training of discrete denoisers: guess the tokens that the chain has hidden or changed.

The cross-entropy of ``x_0`` at every hidden position (all positions on chains without a mask) is least at the
posterior, whatever the weights in time.  :class:`ScoreEntropy` is the weighting that bounds the likelihood.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.discrete.chains import Chain
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.methods.method import Batch, Mean, Method, Networks, Optimizer, Paper, Progress, Question, Update
from fewstep.methods.parts.score_matching import drop_condition
from fewstep.methods.start import Start
from fewstep.ranges import Least, NonNegative, Positive, Share

if TYPE_CHECKING:
    from fewstep.denoisers import Cond

#: What both papers' settings (3e-4, constant after 2500 steps) are here.
SHORT_RUNS = (
    "small networks and short runs: `lr` of 2e-3 (3e-4 there), `warmup` of 50 steps (2500 there), `decay` to 0 over "
    "the budget (constant there), second moments that forget faster (`betas`)",
    "`label_dropout` is for guidance, which the paper has none of",
)


def cross_entropy(
    model: NetworkDiscreteDenoiser, x0: Tensor, x: Tensor, t: Tensor, cond: Cond, hidden: Tensor
) -> Tensor:
    """``-log p(x_0 | x_t)``, mean over the positions that ``x`` does not show, which are the share ``hidden`` of all in
    the batch; ``t`` ``[B]``."""
    logits = model.logits(x, t, cond)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="none")
    return (loss * ~model.chain.visible(x).flatten()).mean() / hidden


def hidden_share(chain: Chain, x: Tensor) -> Tensor:
    """The share of positions that ``x`` does not show; of none at all, one."""
    return (~chain.visible(x)).double().mean().clamp_min(1 / x.numel())


def score_entropy(model: NetworkDiscreteDenoiser, x0: Tensor, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The denoising score entropy (Lou et al. 2023, eq. 9) of a model's score, nats per sequence, mean over samples::

        sum_{y != x} sigma(t) Q[y, x] ( s[y] - r[y] log s[y] + r[y] (log r[y] - 1) ),   r = p(y | x_0) / p(x | x_0)

    Integrated over time it bounds ``-log p(x_0)``.  On a masked chain it is the cross-entropy of the hidden tokens
    times ``sigma keep / (1 - keep)``.
    """
    chain = model.chain
    posterior = model(x, t, cond)
    known = torch.nn.functional.one_hot(x0, chain.tokens).to(posterior)
    score, ratio = chain.score(posterior, x, t), chain.score(known, x, t)
    weights = chain.rates(torch.ones_like(score), x, t)
    tiny = torch.finfo(score.dtype).tiny
    terms = score - torch.xlogy(ratio, score.clamp_min(tiny)) + torch.xlogy(ratio, ratio) - ratio
    return (weights * terms).sum((1, 2)).mean()


@dataclass(frozen=True)
class DiscreteDenoising(Method):
    """Cross-entropy training of a discrete denoiser from its current weights, uniform times.

    ``label_dropout`` is the share of unconditional samples.
    """

    name: ClassVar[str] = "discrete-denoising"
    paper: ClassVar[Paper] = Paper(
        "Simple and Effective Masked Diffusion Language Models", "2406.07524", "from paper text",
        ("the cross-entropy is averaged over hidden tokens; the paper weights it with sigma keep / (1 - keep)",
         *SHORT_RUNS),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "model/loss": "starts at log(tokens), falls quickly to the entropy of single tokens, then slowly below it"
    }

    lr: Annotated[NonNegative, "learning rate"] = 2e-3
    label_dropout: Annotated[Share, "share of samples that are trained without their label"] = 0.1
    clip: Annotated[Positive, "bound on the gradient norm"] = 1.0
    warmup: Annotated[int, Least(0), "steps over which the learning rate rises from 0"] = 50

    def networks(self, start: Start) -> Networks:
        teacher: Any = start.model("teacher")
        if not isinstance(teacher, NetworkDiscreteDenoiser):
            raise ValueError(f"{self.name} trains a network on a discrete chain, not a {type(teacher).__name__}")
        optimizer = Optimizer(
            ("model",), self.lr, betas=(0.9, 0.99), clip=self.clip, warmup=self.warmup, decay="cosine"
        )
        return Networks({"model": start.network("teacher")}, {"model": optimizer}, ema=("model",))

    def loss(
        self, model: NetworkDiscreteDenoiser, x0: Tensor, x: Tensor, t: Tensor, cond: Cond, hidden: Tensor
    ) -> Tensor:
        return cross_entropy(model, x0, x, t, cond, hidden)

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Generator[Update | Question, Tensor, None]:
        chain = nets.model.chain
        if batch.x.is_floating_point() or int(batch.x.max()) >= chain.tokens or int(batch.x.min()) < 0:
            raise ValueError(f"{self.name}: data must be whole numbers below {chain.tokens}, the tokens of the chain")
        t = batch.rng.uniform(len(batch.x), low=chain.t_min, high=chain.t_max)
        cond = drop_condition(batch.cond, nets.model.null, self.label_dropout, batch.rng)
        x = chain.corrupt(batch.x, t, batch.rng)
        hidden = yield Mean(hidden_share(chain, x))
        yield Update("model", self.loss(nets.model, batch.x, x, t, cond, hidden))

    def student(self, nets: Networks) -> Any:
        return nets.model

    def hands_on(self, nets: Networks) -> Mapping[str, nn.Module]:
        return {"teacher": nets.model}


@dataclass(frozen=True)
class ScoreEntropy(DiscreteDenoising):
    """Denoising score entropy, a bound of the likelihood, uniform times; on any chain."""

    name: ClassVar[str] = "score-entropy"
    paper: ClassVar[Paper] = Paper(
        "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution", "2310.16834",
        "from paper text",
        ("the network gives the posterior, from which the score follows; SEDD's gives the log-score itself",
         *SHORT_RUNS),
    )  # fmt: skip
    healthy: ClassVar[dict[str, str]] = {
        "model/loss": "nats per sequence, noisy where tokens are few; falls like the bound on -log p"
    }

    def loss(
        self, model: NetworkDiscreteDenoiser, x0: Tensor, x: Tensor, t: Tensor, cond: Cond, hidden: Tensor
    ) -> Tensor:
        return score_entropy(model, x0, x, t, cond)
