"""Rectified flow and InstaFlow: couplings and straightness in closed form, labels kept with their pairs."""

from __future__ import annotations

import pytest
import torch

from fewstep.data import Dataset
from fewstep.denoisers import Denoiser
from fewstep.exact import Gaussian, GaussianMixture
from fewstep.flow_maps import Jump
from fewstep.methods.flow_maps.rectified_flow import STRAIGHT, InstaFlow, Reflow, ReflowDistillation, straight_pair
from fewstep.methods.method import Batch, Networks, Progress
from fewstep.methods.parts.distances import Plain, l2
from fewstep.methods.parts.stores import Pairs, made_now, solve_heun
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.sampling.rollout import Plan, rollout
from fewstep.schedules import EDM, FlowMatching, TrigFlow

M, C = 0.4, 0.5


def world(schedule=STRAIGHT) -> Gaussian:
    return Gaussian(schedule, torch.full((1,), M, dtype=torch.float64), C**2)


class Rectified(Denoiser):
    """The 2-rectified flow of N(m, c^2): ``v2 = (1 - c)(x - (1 - t) m) / (t + (1 - t) c) - m``."""

    def __init__(self, c: float = C) -> None:
        super().__init__(STRAIGHT, (1,))
        self.c = c

    def forward(self, x, t, cond=None):
        time = torch.as_tensor(t, dtype=torch.float64).expand(len(x))[:, None]
        v = (1 - self.c) * (x - (1 - time) * M) / (time + (1 - time) * self.c) - M
        return x - time * v


@pytest.mark.parametrize("schedule", [EDM(), TrigFlow(sigma_data=0.7), FlowMatching()])
def test_coupling_of_the_exact_flow(schedule) -> None:
    """Pairs of an exact Gaussian teacher tend to its exact flow map with order 2 on every schedule, and to the
    coupling ``x = m + c z`` but for the ``c m / 80`` by which the start N(0, 80^2) misses the noised law."""
    teacher = Gaussian(schedule, torch.full((1,), M, dtype=torch.float64), C**2)
    z = torch.randn(100, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = world(EDM()).flow(80 * z, 80.0, 0.002)
    coarse, fine = (float((solve_heun(teacher, z, n) - exact).abs().max()) for n in (32, 64))
    assert 3.5 < coarse / fine < 4.8
    torch.testing.assert_close(exact, M + C * z, atol=1.05 * C * M / 80, rtol=0)


def test_loss_vanishes_at_the_two_rectified_velocity_and_one_step_is_exact() -> None:
    """On the deterministic pairs ``x = m + c z`` the reflow loss is zero at v2 and one call gives x from z exactly."""
    z = torch.randn(256, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = Batch(M + C * z, None, Rng(2), columns={"noise": z})
    (update,) = Reflow().updates(Networks({"model": Rectified()}, {}), batch, Progress())
    assert float(update.loss) < 1e-24
    (update,) = Reflow().updates(
        Networks({"model": Rectified(0.6)}, {}), Batch(batch.x, None, Rng(2), {"noise": z}), Progress()
    )
    assert float(update.loss) > 1e-3

    for steps in (1, 4):
        method = ReflowDistillation(steps=steps)
        nets = Networks({"student": Jump(Rectified()), "distance": Plain(l2)}, {})
        (update,) = method.updates(nets, Batch(batch.x, None, Rng(3), {"noise": z}), Progress())
        assert float(update.loss) < 1e-24
        plan = Plan(tuple(1 - i / steps for i in range(steps)), gamma=0.0)
        # the state keeps sigma(t_min) = 1e-3 of noise at the end
        torch.testing.assert_close(rollout(Jump(Rectified()), z, plan), batch.x, atol=5e-3, rtol=0)


def straightness(denoiser: Denoiser, n: int = 400) -> float:
    """``int_0^1 E |dx/dt - (x_1 - x_0)|^2 dt`` along the exact trajectory x_t = (1 - t) m + S(t) z, E z^2 = 1."""
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    z = torch.ones(n, 1, dtype=torch.float64)
    s = torch.sqrt((1 - t) ** 2 * C**2 + t**2) if isinstance(denoiser, Gaussian) else t + (1 - t) * C
    x = (1 - t)[:, None] * M + s[:, None] * z
    v = denoiser.velocity(x, t) - (z - (M + C * z))
    return float(v.square().mean())


def test_reflow_straightens() -> None:
    """The straightness functional is 0.2146 for the first flow at c = 0.5 and 0 for the second."""
    assert straightness(world()) == pytest.approx(0.2146, abs=2e-4)
    assert straightness(Rectified()) < 1e-24


def test_straight_pair() -> None:
    """t = 1 is the noise, t = 0 the data."""
    x, z = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    for t, expected in ((0.0, 1.0), (0.25, 1.5), (1.0, 3.0)):
        assert float(straight_pair(x, z, torch.tensor([t], dtype=torch.float64))) == expected


def two_classes() -> GaussianMixture:
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    spread = 0.09 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    return GaussianMixture(TrigFlow(sigma_data=1.0), torch.ones(2), means, spread, labels=[0, 1])


def test_pairs_keep_their_condition_and_repeat() -> None:
    """Each pair is made under its own label (the output lies in that class), the store has the labels in order, and
    the same seed gives the same store."""
    teacher = two_classes()
    data = Dataset("x", torch.zeros(10, 2), torch.arange(10) % 2)
    pairs = Reflow(pairs=64, ode_steps=12).sources(Start(teacher, data))["data"]
    assert torch.equal(pairs.labels, torch.arange(64) % 10 % 2)
    assert bool(((pairs.x[:, 0] > 0) == (pairs.labels == 1)).all())
    again = made_now(Pairs(teacher, 64, 12, pairs.labels), 0)
    assert torch.equal(again.x, pairs.x) and torch.equal(again.columns["noise"], pairs.columns["noise"])
    other = made_now(Pairs(teacher, 64, 12, pairs.labels), 1)
    assert not torch.equal(other.columns["noise"], pairs.columns["noise"])


def test_swapped_labels_at_distillation_hurt() -> None:
    """A perfect conditional student has the loss of the Heun error on its pairs and a large one on swapped labels."""
    teacher = two_classes()
    labels = torch.arange(128) % 2
    pairs = made_now(Pairs(teacher, 128, 24, labels, batch=128), 0)

    class Exact(Denoiser):
        """One-step student by the exact flow map of the teacher."""

        def forward(self, x, t, cond=None):
            frame = EDM()
            world = teacher.on(frame)
            return world.flow(80.0 * x, 80.0, frame.t_min, cond)

    nets = Networks({"student": Jump(Exact(STRAIGHT, (2,), 2)), "distance": Plain(l2)}, {})
    method = ReflowDistillation()

    def loss(cond: torch.Tensor) -> float:
        (update,) = method.updates(
            nets, Batch(pairs.x.double(), cond, Rng(0), {"noise": pairs.columns["noise"].double()}), Progress()
        )
        return float(update.loss)

    assert loss(labels) < 1e-3
    assert loss(1 - labels) > 1.0


def test_recipe_stages() -> None:
    """Guidance is baked into the first pairs only, and only where it is asked for; reflow comes before distillation."""
    plain = InstaFlow()
    assert {plain.guidance, plain.reflow_guidance, Reflow().guidance, ReflowDistillation().guidance} == {1.0}
    stages = [s.method for s in InstaFlow(reflows=2, steps=1, guidance=3.0).stages()]
    assert [s.name for s in stages] == ["reflow", "reflow", "reflow-distil"]
    assert [s.guidance for s in stages] == [3.0, 1.0, 1.0]
    assert [s.method.guidance for s in InstaFlow(reflows=0, guidance=3.0).stages()] == [3.0]
    later = [s.method for s in InstaFlow(reflows=2, guidance=5.0, reflow_guidance=1.5).stages()]
    assert [s.guidance for s in later] == [5.0, 1.5, 1.5]
    with pytest.raises(ValueError, match="reflows"):
        InstaFlow(reflows=-1)


def test_training_without_pairs_is_refused() -> None:
    """Plain data has no paired noise: one clear error."""
    batch = Batch(torch.zeros(4, 1), None, Rng(0))
    with pytest.raises(ValueError, match="'noise' beside each sample"):
        next(Reflow().updates(Networks({"model": Rectified()}, {}), batch, Progress()))
