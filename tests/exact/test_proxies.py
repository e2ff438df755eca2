"""Scores of untrained architectures: what leaves them at 0, closed forms of the classical ones, and how draws are put
together."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kendalltau, rankdata
from torch import Tensor, nn

from fewstep.classifiers import NetworkClassifier
from fewstep.networks.classifiers import Norm, ResNet
from fewstep.randomness import Rng
from fewstep.students.proxies import (
    ALONE,
    BESIDE,
    Scorer,
    flops,
    kendall_tau,
    naswot,
    parameters,
    random_weights,
    rank_sum,
    ranks,
    split_half_tau,
    synflow,
    view,
    z_sum,
)

SHAPE, CLASSES = (1, 8, 8), 10


def resnet(*depths: int, width: int = 4, norm: Norm = "batch") -> NetworkClassifier:
    return NetworkClassifier(ResNet(SHAPE, CLASSES, width, depths, norm), SHAPE, CLASSES)


def batch(seed: int, n: int = 16) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SHAPE, generator=gen), torch.arange(n) % CLASSES


def random(net: NetworkClassifier, seed: int = 0) -> NetworkClassifier:
    return random_weights(net, Rng(seed))


@pytest.mark.parametrize("name", BESIDE)
def test_a_network_is_nearest_to_itself(name: str) -> None:
    """Same network, same weights: exactly 0; below for others."""
    x, labels = batch(0)
    teacher, same, other = (view(random(resnet(1, 1, 1), seed), x, labels) for seed in (0, 0, 1))
    assert float(BESIDE[name](same, teacher)) == 0
    assert float(BESIDE[name](other, teacher)) < -1e-7


def test_scores_know_no_order_of_samples_and_classes() -> None:
    """The batch permuted for both networks; and the classes, which permutes the rows of both heads."""
    x, labels = batch(0)
    order = Rng(0).shuffled(len(x))
    nets = [random(resnet(1, 1, 1), 0).double(), random(resnet(1, 2, 1), 1).double()]
    plain = [view(net, x.double(), labels) for net in nets]
    mixed = [view(net, x.double()[order], labels[order]) for net in nets]
    for name in ("relation", "semantic"):
        assert float(BESIDE[name](*mixed)) == pytest.approx(float(BESIDE[name](*plain)), rel=1e-10)
    classes = Rng(1).shuffled(CLASSES)
    with torch.no_grad():
        for net in nets:
            net.head.weight.copy_(net.head.weight[classes])
    turned = [view(net, x.double(), classes.argsort()[labels]) for net in nets]
    assert float(BESIDE["semantic"](*turned)) == pytest.approx(float(BESIDE["semantic"](*plain)), rel=1e-10)
    mistaken = [view(nets[0], x.double(), classes.argsort()[labels]), plain[1]]
    assert abs(float(BESIDE["semantic"](*mistaken)) - float(BESIDE["semantic"](*plain))) > 1e-4


def test_the_scales_of_the_two_scores_are_far_apart() -> None:
    """Their raw sum would be the semantic score alone."""
    x, labels = batch(0, 64)
    student, teacher = (view(random(resnet(*depths), seed), x, labels) for seed, depths in enumerate(((1, 1, 1),) * 2))
    assert BESIDE["semantic"](student, teacher) < 50 * BESIDE["relation"](student, teacher) < 0


def test_weights_are_drawn_anew_and_norms_do_nothing() -> None:
    net = resnet(2, 2, 2, width=16)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.fill_(3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    made = random(net)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    drawn = torch.cat([m.weight.flatten() for m in made.modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    n = len(drawn)
    assert abs(float(drawn.mean())) < 4 / n**0.5 and abs(float(drawn.var()) - 1) < 4 * (2 / n) ** 0.5
    assert all(bool((m.running_mean == 0).all()) for m in made.modules() if isinstance(m, nn.BatchNorm2d))
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(bool((m.weight == 1).all()) and bool((m.bias == 0).all()) for m in norms)
    assert bool((made.head.bias == 0).all())
    x = batch(0)[0]
    assert torch.equal(random(net)(x), random(resnet(2, 2, 2, width=16))(x))
    assert not torch.equal(random(net, 1)(x), random(net)(x))


def test_scoring_leaves_networks_as_they_were() -> None:
    """Running statistics and modes too."""
    net, teacher = resnet(1, 1, 1).eval(), resnet(2, 1, 1).train()
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in (net, teacher)]
    Scorer(teacher, [batch(0)], (*BESIDE, *ALONE), Rng(0))(net)
    for n, state in zip((net, teacher), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in n.state_dict().items())
    assert not net.training and teacher.training


def test_a_score_depends_on_its_own_student_alone() -> None:
    """And on its draw: other weights and another batch each time."""
    batches, names = [batch(0), batch(1)], ("relation", "semantic", "naswot")
    one, other = (Scorer(resnet(2, 2, 2), batches, names, Rng(0)) for _ in range(2))
    other(resnet(1, 2, 1))
    assert torch.equal(one(resnet(1, 1, 1)), other(resnet(1, 1, 1)))
    scores = one(resnet(1, 1, 1))
    assert scores.shape == (2, 3) and scores.dtype == torch.float64
    assert bool((scores[0] != scores[1]).all())
    again = Scorer(resnet(2, 2, 2), batches[:1], names, Rng(1))(resnet(1, 1, 1))
    assert bool((scores[:1] != again).all())


def test_every_draw_has_weights_of_its_own() -> None:
    """The same batch twice: another teacher, and another student."""
    scorer = Scorer(resnet(2, 2, 2), [batch(0), batch(0)], ("relation", "synflow"), Rng(0))
    assert not torch.equal(scorer.teacher[0].last, scorer.teacher[1].last)
    first, second = scorer(resnet(1, 1, 1))[:, 1]
    assert first != second


def test_a_view_is_by_the_statistics_of_its_batch() -> None:
    """Norms take the scale of the pictures out; running statistics, which nobody has trained, would leave it."""
    x, labels = batch(0)
    net = random(resnet(1, 1, 1))
    assert torch.allclose(view(net, x, labels).last, view(net, 10 * x, labels).last, rtol=1e-3, atol=1e-3)


def test_networks_of_other_widths_leave_the_relation() -> None:
    teacher = resnet(1, 1, 1, width=8)
    assert Scorer(teacher, [batch(0)], ("relation",), Rng(0))(resnet(1, 1, 1)) < 0
    with pytest.raises(ValueError, match="penultimate widths"):
        Scorer(teacher, [batch(0)], ("semantic",), Rng(0))(resnet(1, 1, 1))


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="'snip' is no proxy: those are relation, semantic"):
        Scorer(resnet(1, 1, 1), [batch(0)], ("snip",), Rng(0))
    with pytest.raises(ValueError, match="at least one"):
        Scorer(resnet(1, 1, 1), [], ("relation",), Rng(0))
    x, labels = batch(0)
    x[0] = 1e38  # overflows for one sample alone
    with pytest.raises(ValueError, match="activations overflow"):
        view(random(resnet(1, 1, 1, norm="none")), x, labels)


def test_parameters_and_operations_are_counted() -> None:
    """A layer of 3x3 convolutions: ``2 * 9 c_in c_out h w``, and ``2 c_in c_out`` of the linear one."""
    net = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 64, 10))
    x, _ = batch(0)
    assert parameters(net, x) == 9 * 5 + 5 + 320 * 10 + 10
    assert flops(net, x) == 2 * 9 * 5 * 64 + 2 * 320 * 10


def test_naswot_counts_relus_that_agree() -> None:
    """Two samples with codes that agree in ``a`` of ``n`` units: ``log(n^2 - a^2)``."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    codes = torch.cat([net[0](x), net[2](net[0](x).relu())], 1) > 0
    agree = int((codes[0] == codes[1]).sum())
    assert 0 < agree < 11
    assert naswot(net, x) == pytest.approx(math.log(11**2 - agree**2), rel=1e-12)


def test_synflow_of_a_chain_is_its_depth_times_its_flow() -> None:
    """Every layer without bias carries all of ``R = 1^T |W_L| ... |W_1| 1``."""
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False) if k % 2 == 0 else nn.ReLU() for k in range(5)))
    flow = torch.ones(4, dtype=torch.float64)
    for layer in net[::2]:
        flow = layer.weight.detach().double().abs() @ flow
    assert synflow(net, torch.randn(3, 4)) == pytest.approx(math.log(3 * float(flow.sum())), rel=1e-12)


def test_kendall_tau_is_that_of_scipy() -> None:
    """Ties included."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (torch.randint(0, 8, (15,), generator=draw) for _ in range(2))
        assert kendall_tau(a, b) == pytest.approx(float(kendalltau(a, b).statistic), abs=1e-12)


def test_ranks_are_those_of_scipy() -> None:
    a = torch.randint(0, 8, (3, 15), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ranks(a), torch.tensor(rankdata(a, axis=1)) - 1)


def test_draws_that_agree_and_draws_of_nothing() -> None:
    """Halves of the same ranking agree fully; of noise not at all: the mean of 20 splits of 27 is within 0.4."""
    same = torch.arange(27.0).expand(6, 27)
    assert split_half_tau(same, Rng(0)) == 1
    noise = torch.randn(6, 27, generator=torch.Generator().manual_seed(0))
    assert abs(split_half_tau(noise, Rng(0))) < 0.4
    signal = split_half_tau(same / 27 + noise, Rng(0))
    assert signal < split_half_tau(same / 27 + 0.1 * noise, Rng(0)) < 1
    with pytest.raises(ValueError, match="at least 2"):
        split_half_tau(same[:1], Rng(0))


def test_sums_of_ranks_and_of_z_scores_know_no_scale() -> None:
    """A proxy a thousand times as large changes nothing, where it decides a raw sum."""
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = torch.stack([scores[0], 1000 * scores[1] + 7])
    assert torch.equal(rank_sum(scaled), rank_sum(scores))
    assert torch.allclose(z_sum(scaled), z_sum(scores), atol=1e-12)
    assert kendall_tau(scaled.sum(0), scaled[1]) == 1 > kendall_tau(rank_sum(scaled), scaled[1])
    one = torch.stack([z_sum(scores[:, [k]], scores) for k in range(9)]).flatten()
    assert torch.allclose(one, z_sum(scores), atol=1e-12)
    level = torch.stack([scores[0], torch.full((9,), 2.0, dtype=torch.float64)])
    assert torch.allclose(z_sum(level), z_sum(scores[:1]), atol=1e-12)
