"""Language modelling: its loss in closed form, what the mask leaves out, and that it finds the law of a chain."""

import pytest
import torch
from branches import table
from torch import Tensor

from fewstep.data import Dataset
from fewstep.exact import MarkovChain
from fewstep.language.modelling import LanguageModelling
from fewstep.language.rollouts import rollout
from fewstep.language_models import LanguageModel, NetworkLanguageModel
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.start import Start
from fewstep.networks.causal import GRULanguageModel
from fewstep.randomness import Rng
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings
from fewstep.training.trainer import train

#: Appendix B of the paper; 6e-4 is the rate of its smallest model, and warm-up is counted in tokens there.
PUBLISHED = {
    "lr": 6e-4, "warmup": 375_000_000, "decay": "cosine:0.1", "weight_decay": 0.1, "clip": 1.0,
    "optimizer": {
        "kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0, "decay": "cosine:0.1",
    },
}  # fmt: skip

TOKENS = torch.tensor([[0, 2, 1, 3, 1], [3, 3, 0, 0, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()


def update(model: LanguageModel, tokens: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    columns = {} if mask is None else {"mask": mask}
    nets = Networks({"student": model}, {})
    (found,) = LanguageModelling().updates(nets, Batch(tokens, None, Rng(0), columns), Progress())
    return float(found.loss), float(found.logs["accuracy"])


def test_the_loss_is_the_mean_over_each_sequence_and_then_over_sequences() -> None:
    p = table(0)
    first = -(p[2, 1].log() + p[1, 3].log() + p[3, 1].log()) / 3
    second = -(p[3, 3].log() + p[3, 0].log()) / 2  # the first token has no law
    loss, accuracy = update(MarkovChain(p), TOKENS, MASK)
    assert loss == pytest.approx(float(first + second) / 2, rel=1e-12)
    likely = p.argmax(-1)
    right = [[likely[2] == 1, likely[1] == 3, likely[3] == 1], [likely[3] == 3, likely[3] == 0]]
    assert accuracy == pytest.approx(sum(sum(map(float, row)) / len(row) for row in right) / 2)


def test_what_the_mask_leaves_out_behind_a_sequence_may_be_anything() -> None:
    other = TOKENS.clone()
    other[1, 3:] = torch.tensor([1, 2])
    model = NetworkLanguageModel(GRULanguageModel(4, 5, width=8), 4, 5).double()
    assert update(model, TOKENS, MASK) == update(model, other, MASK)
    assert update(model, TOKENS) != update(model, other)


def test_training_finds_the_law_of_a_chain() -> None:
    """The loss of the chain itself on these texts is what no model can fall below but by learning them by heart; a
    small GRU came to within 0.02 nats of it, from 1.4."""
    chain = MarkovChain(table(0).float())
    texts = rollout(chain, torch.arange(4).repeat(256)[:, None], Rng(0), 15).tokens
    model = NetworkLanguageModel(GRULanguageModel(4, 16, width=16), 4, 16)
    settings = Settings(Budget(150), batch=64, precision="fp32")
    made = train(LanguageModelling(lr=1e-2), Start(model, Dataset("chain", texts)), settings, show=False).model
    before, after, best = (update(m, texts)[0] for m in (model, made, chain))
    assert best - 0.02 < after < best + 0.05 < before - 0.3
