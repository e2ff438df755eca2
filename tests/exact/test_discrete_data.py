"""Text as tokens, perplexity beside entropy, training losses, and discrete models as plain data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fewstep.data import Dataset
from fewstep.data.text import LETTERS, Alphabet, load_text, read_text
from fewstep.discrete.chains import Chain, Masked, Ordinal, Uniform
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.discrete.exact import FactorizedLaw, JointLaw, MarkovLaw
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.noise import Cosine, Geometric
from fewstep.discrete.samplers import Plan, sample
from fewstep.methods.method import Batch, Progress
from fewstep.methods.start import Start
from fewstep.methods.teachers.discrete_denoising import (
    DiscreteDenoising,
    ScoreEntropy,
    cross_entropy,
    hidden_share,
    score_entropy,
)
from fewstep.metrics.tokens import NGram, token_quality
from fewstep.models import kinds
from fewstep.networks.transformer import Transformer
from fewstep.randomness import Rng
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings, train

F64 = torch.float64


class Table(torch.nn.Module):
    """Logits per position, whatever the state: the right model of independent tokens on a masked chain."""

    def __init__(self, length: int, tokens: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(length, tokens))

    def forward(self, x, t, cond=None):
        return self.logits.expand(len(x), -1, -1)


class Exact(torch.nn.Module):
    """The logits of an exact posterior."""

    def __init__(self, law) -> None:
        super().__init__()
        self.law = law

    def forward(self, x, t, cond=None):
        return self.law.posterior_of(x, t.double(), None).log().float()


def test_letters() -> None:
    """Lower case, everything else one space; decoding is the inverse, and MASK shows."""
    tokens = LETTERS.encode("The  king's\n 2 men--\tdie!")
    assert LETTERS.decode(tokens[None]) == ["the king s men die"]
    assert LETTERS.decode(torch.tensor([[1, 27, 0, 26]])) == ["a_ z"]
    plain = Alphabet.of("hello")
    assert plain.characters == "ehlo" and plain.decode(plain.encode("hole")[None]) == ["hole"]
    with pytest.raises(ValueError, match="'x' is not in the alphabet"):
        plain.encode("hex")
    with pytest.raises(ValueError, match="two different characters"):
        Alphabet("aa")
    with pytest.raises(ValueError, match="needs the space"):
        Alphabet("abc", folded=True)


def test_windows_of_a_text(tmp_path: Path) -> None:
    """Training and held-out windows come from different blocks, cover the text, and have the asked length."""
    path = tmp_path / "numbers.txt"
    alphabet = Alphabet("".join(chr(0x4E00 + i) for i in range(20000)))
    path.write_text(alphabet.characters, encoding="utf-8")
    parts = {split: load_text(path, split, length=64, stride=64, alphabet=alphabet).x for split in ("train", "test")}
    seen = {split: set(x.flatten().tolist()) for split, x in parts.items()}
    assert seen["train"] | seen["test"] == set(range(20000 // 64 * 64)) and not seen["train"] & seen["test"]
    assert seen["test"] == set(range(3 * 4096, 4 * 4096))
    assert load_text(path, length=64, alphabet=alphabet).x[1, 0] == 16  # a quarter of the length apart
    with pytest.raises(ValueError, match="too few for windows of 5000"):
        load_text(path, length=5000, alphabet=alphabet)
    with pytest.raises(FileNotFoundError, match="no text at"):
        read_text(tmp_path / "none.txt")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_text(path)


def test_the_bundled_text() -> None:
    """Two plays, as letters, with the entropy of English."""
    x = load_text(length=64, stride=64).x
    share = torch.bincount(x.flatten(), minlength=27).double() / x.numel()
    assert x.numel() > 150000 and int(x.max()) == 26
    assert 2.7 < float(-torch.xlogy(share, share).sum()) < 2.9
    assert "wherefore art thou romeo" in " ".join(LETTERS.decode(LETTERS.encode(read_text("shakespeare"))[None]))


def test_perplexity_is_that_of_the_reference() -> None:
    """Samples of a law have the exponential of its entropy rate as perplexity, with an error that fits, and entropies
    of a uniform law are ``log K``."""
    chain = Masked(4)
    following = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=F64) ** 2
    law = MarkovLaw(chain, torch.ones(4), following, 32)
    stationary = torch.linalg.matrix_power(law.following, 200)[0]
    rate = -(stationary[:, None] * law.following * law.following.log()).sum()
    found = token_quality(law.draw(4000, Rng(0)), law.log_probability, 4)
    # 5 standard errors, and the start, which is not stationary, in one token of 32
    assert found.perplexity.value == pytest.approx(float(rate.exp()), rel=0.03)
    assert 0 < found.perplexity.error < 0.01
    uniform = torch.arange(4).repeat(10, 2)
    flat = token_quality(uniform, FactorizedLaw(chain, torch.ones(8, 4)).log_probability, 4)
    assert flat.perplexity.value == pytest.approx(4) and flat.entropy == pytest.approx(math.log(4))
    assert flat.sequence_entropy == pytest.approx(math.log(4))


def test_perplexity_and_its_error_by_hand() -> None:
    """``exp`` of the mean nats per token, and the standard error of that mean times it; one sample has no error."""
    x, logs = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]), torch.tensor([-2.0, -4.0, -12.0])
    found = token_quality(x, lambda x: logs[: len(x)], 2)
    perplexity = math.exp(1.5)  # nats per token 0.5, 1 and 3: mean 1.5, variance 1.75
    assert found.perplexity.value == pytest.approx(perplexity, rel=1e-14)
    assert found.perplexity.error == pytest.approx(math.sqrt(1.75 / 3) * perplexity, rel=1e-14)
    entropies = [
        -sum(p * math.log(p) for p in law if p) for law in ((0.5, 0.5), (0.25, 0.75), (0.0, 1.0), (0.25, 0.75))
    ]
    assert found.sequence_entropy == pytest.approx(sum(entropies[:3]) / 3, rel=1e-14)
    assert found.entropy == pytest.approx(entropies[3], rel=1e-14) and found.n == 3
    alone = token_quality(x[:1], lambda x: logs[:1], 2)
    assert alone.perplexity.value == pytest.approx(math.exp(0.5)) and math.isnan(alone.perplexity.error)


def test_entropy_shows_what_perplexity_hides() -> None:
    """One likely token for ever has a lower perplexity than the data, and no entropy."""
    law = FactorizedLaw(Masked(3), torch.tensor([[0.6, 0.3, 0.1]]).expand(16, 3))
    data = token_quality(law.draw(500, Rng(0)), law.log_probability, 3)
    collapsed = token_quality(torch.zeros(500, 16, dtype=torch.long), law.log_probability, 3)
    assert collapsed.perplexity.value < 0.8 * data.perplexity.value
    assert collapsed.entropy == 0 and collapsed.sequence_entropy == 0 and data.entropy > 0.8
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        token_quality(torch.full((2, 4), 3), law.log_probability, 3)


def test_ngrams_are_laws() -> None:
    """Probabilities after any history sum to 1, a bigram's follow the formula by hand, order 1 is smoothed counts."""
    windows = torch.tensor([[0, 1, 0, 1, 2, 0, 1]])
    model = NGram(windows, 4, order=3)
    for history in ((), (0,), (1, 0), (3, 3), (0, 1, 2)):
        assert sum(model.probability(c, history) for c in range(4)) == pytest.approx(1, abs=1e-12)
    one = NGram(windows, 4, order=1)
    assert one.probability(0, ()) == pytest.approx((3 + 3 / 4) / (7 + 3))
    two = NGram(windows, 4, order=2)
    assert two.probability(1, (2, 0)) == pytest.approx((3 + 1 * one.probability(1, ())) / (3 + 1))
    expected = math.log(two.probability(0, ())) + math.log(two.probability(1, (0,)))
    assert float(two(torch.tensor([[0, 1]]))) == pytest.approx(expected)


@pytest.mark.parametrize("noise", [None, Cosine(), Geometric()], ids=repr)
def test_score_entropy_of_masks_is_weighted_cross_entropy(noise) -> None:
    """On a masked chain the denoising score entropy is ``sigma keep / (1 - keep)`` times the cross-entropy of the
    hidden tokens, sample by sample, for any network."""
    chain = Masked(5) if noise is None else Masked(5, noise)
    torch.manual_seed(0)
    model = NetworkDiscreteDenoiser(Transformer(6, 5, 6, 16, 1, 2), chain, 6)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    x0, t = torch.randint(5, (1, 6)), torch.tensor([0.6], dtype=F64)
    x = chain.corrupt(x0, t, Rng(2))
    hidden = int((x == 5).sum())
    keep = chain.noise.keep(t)
    weight = float(chain.noise.rate(t) * keep / (1 - keep))
    expected = weight * hidden * float(cross_entropy(model, x0, x, t, None, hidden_share(model.chain, x)).detach())
    assert 0 < hidden < 6
    assert float(score_entropy(model, x0, x, t, None).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chain", [Masked(3), Uniform(3), Ordinal(3)], ids=repr)
@pytest.mark.parametrize("loss", [cross_entropy, score_entropy])
def test_losses_are_least_at_the_posterior(chain: Chain, loss) -> None:
    """The exact posterior has a smaller loss than posteriors of neighbouring laws, on the same corrupted data."""
    table = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64) ** 2
    law = JointLaw(chain, table)
    n = 20000
    x0 = law.draw(n, Rng(0))
    t = Rng(1).uniform(n, low=0.1, high=0.9)
    x = chain.corrupt(x0, t, Rng(2))

    def value(weights: torch.Tensor) -> float:
        model = NetworkDiscreteDenoiser(Exact(JointLaw(chain, weights)), chain, 2)
        with torch.no_grad():
            further = (hidden_share(chain, x),) if loss is cross_entropy else ()
            return float(loss(model, x0, x, t, None, *further))

    exact = value(table)
    for i, j in ((0, 0), (1, 2), (2, 1)):
        for factor in (0.5, 2.0):
            other = table.clone()
            other[i, j] *= factor
            assert value(other) > exact


@pytest.mark.parametrize("method", [DiscreteDenoising(lr=0.05), ScoreEntropy(lr=0.05)], ids=lambda m: m.name)
def test_training_finds_the_frequencies(method: DiscreteDenoising) -> None:
    """Independent tokens on a masked chain: the trained table is the data's frequencies."""
    chain = Masked(4)
    law = FactorizedLaw(chain, torch.rand(3, 4, generator=torch.Generator().manual_seed(0)))
    data = Dataset("made", law.draw(4096, Rng(0)))
    model = NetworkDiscreteDenoiser(Table(3, 4), chain, 3)
    made = train(method, Start(model, data), Settings(Budget(150), batch=256, precision="fp32"), show=False).model
    found = made(chain.prior(1, 3, Rng(0)), 1.0)[0].double()
    counts = torch.stack([torch.bincount(data.x[:, i], minlength=4) for i in range(3)]).double() / 4096
    assert float((found - counts).abs().max()) < 0.03


def test_training_refuses_what_it_cannot_use() -> None:
    """Pictures and tokens beyond the alphabet are named; so is a model that is no network."""
    chain = Masked(4)
    method = DiscreteDenoising()
    nets = method.networks(Start(NetworkDiscreteDenoiser(Table(3, 4), chain, 3)))
    for x in (torch.zeros(2, 3), torch.full((2, 3), 4), torch.full((2, 3), -1)):
        with pytest.raises(ValueError, match="whole numbers below 4"):
            next(method.updates(nets, Batch(x, None, Rng(0)), Progress()))
    with pytest.raises(ValueError, match="not a FactorizedLaw"):
        method.networks(Start(FactorizedLaw(chain, torch.ones(3, 4))))


@pytest.mark.parametrize("chain", [Masked(5, Cosine(0.01)), Uniform(5, Geometric()), Ordinal(5, width=1.5)], ids=repr)
def test_models_as_plain_data(chain: Chain) -> None:
    """A description read back makes the same chain, network and plans, and with the weights the same samples."""
    torch.manual_seed(0)
    net = Transformer(6, 5, chain.states, 16, 1, 2, classes=3, timed=False)
    model = NetworkDiscreteDenoiser(net, chain, 6, 3)
    made = LearnedSampler(model, {2: Plan((1.0, 0.4, 0.1), (0.5, 1.0))}, "tweedie")
    again = kinds.build(kinds.describe(made))
    again.load_state_dict(made.state_dict())
    assert again.plans == made.plans and again.stepper == "tweedie" and again.denoiser.chain == chain
    assert torch.equal(again.sample(4, seed=1), made.sample(4, seed=1))
    assert torch.equal(sample(again.denoiser, 2, 3), sample(model, 2, 3))
    with pytest.raises(TypeError, match="a Table is not one of fewstep"):
        kinds.describe(NetworkDiscreteDenoiser(Table(3, 5), chain, 3))
    with pytest.raises(TypeError, match="cannot describe a FactorizedLaw"):
        kinds.describe(LearnedSampler(FactorizedLaw(Masked(2), torch.ones(2, 2)), {1: Plan((1.0, 0.1))}))
    broken = kinds.describe(model)
    with pytest.raises(ValueError, match=r'chain\.name = "Other" must be one of Masked'):
        kinds.build(broken | {"chain": broken["chain"] | {"name": "Other"}})
