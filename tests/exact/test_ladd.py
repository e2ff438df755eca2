"""LADD: what the heads can learn, whom each update reaches, which levels are looked at, and on what samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data import Dataset, Prior
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import Gaussian
from fewstep.methods.matching.ladd import LADD
from fewstep.methods.method import Batch, Progress
from fewstep.methods.parts.adversary import AdversarialLoss, Adversary, Discriminator, Hinge, NonSaturating
from fewstep.methods.parts.heads import PatchHead, Told, ToldHeads
from fewstep.methods.parts.times import Uniform
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.taps import as_grid, grid_shape
from fewstep.predictions import Velocity
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.schedules import FlowMatching
from fewstep.training.budget import Budget
from fewstep.training.settings import Settings

F64 = torch.float64
SHAPE = (1, 8, 8)
PUBLISHED: dict[str, Any] = {
    # as the paper is described: 1, 2 and 4 calls; p = [0.7, 0.1, 0.1, 0.1] after 500 iterations with [0, 0, 0.5, 0.5];
    # times of the heads from a logit-normal law with m = 1, s = 1; every block of a depth of 24 has a head
    "steps": (1, 2, 4), "probabilities": (0.7, 0.1, 0.1, 0.1), "first_probabilities": (0.0, 0.0, 0.5, 0.5),
    "noise_mean": 1.0, "noise_std": 1.0, "blocks": 24, "layers": None,
    **dict.fromkeys(("first_share", "pairs", "ode_steps", "guidance", "lr", "discriminator_lr", "clip", "warmup"), ...),
    # StyleGAN-T, networks/discriminator.py (cmap_dim)
    "projection": 64, "r1": 0.0,
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}  # fmt: skip


def teacher(kind: str = "mlp", classes: int | None = 3) -> NetworkDenoiser:
    torch.manual_seed(0)
    net = MLP(SHAPE, 16, 2, classes) if kind == "mlp" else UNet(SHAPE, (8, 16), 1, 32, classes)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return NetworkDenoiser(net, FlowMatching(), Velocity(), SHAPE, classes)


def batch(n: int = 6, seed: int = 0) -> Batch:
    rng = Rng(seed)
    return Batch(rng.normal(n, *SHAPE), torch.arange(n) % 3, rng)


class Line(Gaussian):
    """A body on the line whose features are the state itself."""

    def features(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        return x

    feature_shape = (1,)


class Ratio(nn.Module):
    """``l = k log p / q`` of two noised Gaussians of one variance, or its sign."""

    def __init__(self, slope: float, middle: float, sign: bool) -> None:
        super().__init__()
        self.k, self.slope, self.middle, self.sign = nn.Parameter(torch.ones((), dtype=F64)), slope, middle, sign

    def forward(self, features: Tensor) -> Tensor:
        ratio = self.k * self.slope * (features[:, 0] - self.middle)
        return ratio.sign() if self.sign else ratio


@pytest.mark.parametrize("game", [Hinge(), NonSaturating()], ids=["hinge", "non-saturating"])
def test_the_optimum_is_the_log_ratio_at_the_noised_input(game: AdversarialLoss) -> None:
    """Two Gaussians noised to s: at the log-ratio of the noised laws the non-saturating loss is stationary; the hinge
    loss has its minimum at the sign of it, which is 1 minus their distance in total variation."""
    mp, mq, v, s, n = 0.6, -0.4, 0.5, 0.4, 100_000
    alpha, variance = 1 - s, (1 - s) ** 2 * v + s**2
    slope, middle = alpha * (mp - mq) / variance, alpha * (mp + mq) / 2
    body = Line(FlowMatching(), torch.zeros(1, dtype=F64), v)
    rng = Rng(0)
    real, fake = (m + math.sqrt(v) * rng.normal(n, 1, dtype=F64) for m in (mp, mq))

    def loss(head: nn.Module) -> Tensor:
        told = Discriminator(Adversary(game, Uniform(s, s), head=lambda _: head), body)
        return told.loss(body, real, fake, None, Rng(1))[0]

    if isinstance(game, Hinge):
        variation = math.erf(alpha * (mp - mq) / 2 / math.sqrt(2 * variance))
        assert float(loss(Ratio(slope, middle, True)).detach()) == pytest.approx(1 - variation, abs=0.01)
        # the law of the samples themselves is further apart than that of the noised ones
        assert variation < math.erf((mp - mq) / 2 / math.sqrt(2 * v)) - 0.1
        assert float(loss(Ratio(slope, middle, False)).detach()) > 1 - variation + 0.02
    else:
        for middle_of, still in ((middle, True), (middle + 0.5, False)):
            head = Ratio(slope, middle_of, False)
            loss(head).backward()
            assert (abs(float(head.k.grad)) < 0.01) is still


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_each_update_reaches_its_own_networks_only(kind: str) -> None:
    """Student, then heads; the student's gradient comes through heads and teacher, which have none; the frozen features
    are the same before and after."""
    model = teacher(kind)
    method = LADD(pairs=0)
    nets = method.networks(Start(model))
    before = {name: p.clone() for name, p in nets.teacher.named_parameters()}
    updates = method.updates(nets, batch(), Progress(fraction=0.5))
    first = next(updates)
    assert first.group == "student"
    first.loss.backward()
    assert all(p.grad is None for p in [*nets.discriminator.parameters(), *nets.teacher.parameters()])
    assert any(float(p.grad.abs().max()) > 0 for p in nets.student.parameters() if p.grad is not None)
    nets.zero_grad(set_to_none=True)
    second = next(updates)
    assert second.group == "discriminator"
    second.loss.backward()
    assert all(p.grad is None for p in [*nets.student.parameters(), *nets.teacher.parameters()])
    assert all(p.grad is not None for p in nets.discriminator.parameters())
    second.then()
    assert all(torch.equal(before[name], p) for name, p in nets.teacher.named_parameters())
    assert not any(p.requires_grad for p in nets.teacher.parameters())


def test_the_students_levels_and_when_they_are_looked_at() -> None:
    """1, 0.75, 0.5 and 0.25 on flow matching; the two least noisy ones first, then seven tenths at pure noise."""
    method = LADD(pairs=0)
    nets = method.networks(Start(teacher()))
    seen: list[Tensor] = []
    real = nets.student.to_data
    nets.student.to_data = lambda x, t, cond: seen.append(t) or real(x, t, cond)
    with torch.no_grad():
        for fraction in (0.04, 0.06):
            method.draw(nets, batch(2000), Progress(fraction=fraction))
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=F64)
    for t, weights in zip(seen, (method.first_probabilities, method.probabilities), strict=True):
        shares = (t[:, None] == levels).double().mean(0)
        torch.testing.assert_close(shares, torch.tensor(weights, dtype=F64), atol=0.05, rtol=0)
    plans = method.student(nets).plans
    assert {k: plan.times for k, plan in plans.items()} == {1: (1.0,), 2: (1.0, 0.5), 4: (1.0, 0.75, 0.5, 0.25)}
    assert all(plan.gamma == 1.0 for plan in plans.values())


def test_a_call_at_pure_noise_is_that_of_inference() -> None:
    """At t = 1 nothing of the sample is left: the student is trained on what one call makes."""
    method = LADD(pairs=0, probabilities=(1.0,), first_probabilities=(1.0,), steps=(1,))
    nets = method.networks(Start(teacher()))
    given = batch()
    with torch.no_grad():
        x = method.draw(nets, given, Progress())
        again = batch().rng
        again.choice(6, (1.0,))
        torch.testing.assert_close(x, method.student(nets)(again.normal(6, *SHAPE), given.cond))


def made(data: Any, **changes: Any) -> dict[str, Tensor]:
    settings = Settings(Budget(2), batch=4, precision="fp32")
    method = LADD(**{"pairs": 8, "ode_steps": 2, "first_share": 0.0, **changes})
    return run_recipe(method, teacher(), data, settings, show=False).model.state_dict()


def test_the_teachers_samples_stand_for_data() -> None:
    """Other data, or none, make the same student, bit for bit; other conditions, and real data, do not."""
    labels = torch.arange(12) % 3
    real = Dataset("other", torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(1)), labels)
    first, same, other, taught = (
        made(real), made(Prior(SHAPE, labels)), made(Prior(SHAPE, 0 * labels)), made(real, pairs=0)
    )  # fmt: skip
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    for wrong in (other, taught):
        assert not all(torch.equal(value, wrong[name]) for name, value in first.items())


def test_a_given_student_is_where_training_starts() -> None:
    """And one without a single update is what was given."""
    start = teacher("unet")
    for p in start.parameters():
        p.data += 0.01
    nets = LADD(pairs=0).networks(Start(teacher("unet"), given={"student": start}))
    x, t, cond = torch.randn(2, *SHAPE), torch.full((2,), 0.7, dtype=F64), torch.tensor([0, 1])
    assert torch.equal(nets.student.denoiser(x, t, cond), start(x, t, cond))
    assert not torch.equal(nets.teacher(x, t, cond), start(x, t, cond))


def test_alarms_name_collapse_and_a_won_game() -> None:
    alarm = LADD.unstable["student/sample_std"]
    lines = [{"student/sample_std": v} for v in (0.5, 0.9, 1.0)]
    assert alarm.found("student/sample_std", {"student/sample_std": 0.6}, lines) is None
    assert "fallen to 40 %" in str(alarm.found("student/sample_std", {"student/sample_std": 0.4}, lines))
    won = LADD.unstable["discriminator/discriminator_accuracy"]
    name, told = "discriminator/discriminator_accuracy", [{"discriminator/discriminator_accuracy": 1.0}] * 4
    assert "stayed above" in str(won.found(name, told[0], told))
    nets = LADD(pairs=0).networks(Start(teacher()))
    one, two = LADD(pairs=0).updates(nets, batch(), Progress(fraction=0.5))
    assert {"sample_std"} == set(one.logs) and {"discriminator_accuracy"} == set(two.logs)


# The heads


def test_passes_leave_the_spectral_norms_and_updates_move_them() -> None:
    """After power iteration the largest singular value of every convolution is 1; a pass in training changes no number,
    so that a batch in parts is the same batch; ``follow`` catches up with a weight that moved."""
    torch.manual_seed(0)
    head = PatchHead((12, 4, 4)).double().train()
    held = {name: value.clone() for name, value in head.state_dict().items()}
    head(torch.randn(3, 12, 4, 4, dtype=F64))
    assert all(torch.equal(value, held[name]) for name, value in head.state_dict().items())

    def largest() -> list[float]:
        layers = (head.first, head.around, head.leave)
        return [float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2).detach()) for layer in layers]

    for layer in (head.first, head.around):
        layer.parametrizations.weight.original.data += 0.2
    assert max(largest()) > 1.5
    for _ in range(60):
        head.follow()
    assert largest() == pytest.approx([1.0] * 3, abs=1e-3)
    assert LADD(pairs=0).networks(Start(teacher())).discriminator.follow() is None


def test_heads_of_tokens_grids_and_vectors() -> None:
    """Tokens are a closed sequence of which every logit sees nine, a grid 3 x 3, a vector itself."""
    torch.manual_seed(0)
    for length in (1, 2, 12):
        head, x = PatchHead((length, 8)).double(), torch.randn(2, length, 8, dtype=F64)
        logits = head(x)
        assert logits.shape == (2, 1, length)
        torch.testing.assert_close(head(x.roll(1, 1)), logits.roll(1, 2))
    reach = torch.autograd.functional.jacobian(lambda y: head.around(y)[0, 0, 0], torch.randn(1, 8, 12, dtype=F64))
    assert torch.nonzero(reach.abs().sum((0, 1))).flatten().tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11]
    assert PatchHead((8, 4, 6), 3)(torch.randn(2, 8, 4, 6)).shape == (2, 3, 24)
    assert PatchHead((8, 2, 4, 6))(torch.randn(2, 8, 2, 4, 6)).shape == (2, 1, 48)
    assert PatchHead((8,), 3)(torch.randn(2, 8)).shape == (2, 3, 1)


def test_tokens_of_a_picture_are_laid_out_as_its_grid() -> None:
    """Row by row, where they are its square patches; anything else stays."""
    tokens = torch.arange(24.0).reshape(1, 24, 1)
    grid = as_grid(tokens, (3, 8, 12))
    assert grid.shape == (1, 1, 4, 6) and grid[0, 0, 1].tolist() == [6, 7, 8, 9, 10, 11]
    assert torch.equal(as_grid(tokens, (3, 24)), tokens) and torch.equal(as_grid(tokens, (3, 10, 12)), tokens)
    assert grid_shape((16,), (3, 8, 8)) == (16,) and grid_shape((6, 4, 4), (3, 8, 8)) == (6, 4, 4)
    assert torch.equal(as_grid(torch.ones(2, 6, 4, 4), (3, 8, 8)), torch.ones(2, 6, 4, 4))


def test_heads_are_told_the_time_and_what_null_names() -> None:
    """Logits at the same features differ with the label, the prompt and the time; a picture that "no condition" does
    not name is left to the features."""
    torch.manual_seed(0)
    features, log_snr = [torch.randn(3, 16), torch.randn(3, 8, 4, 4)], torch.zeros(3, dtype=F64)

    def told(null: Any, classes: int | None) -> Any:
        return ToldHeads([(16,), (8, 4, 4)], Told(null, classes, 6), 6)

    labels = told(torch.tensor([-1]), 3)
    one = labels(features, log_snr, torch.tensor([0, 1, 2]))
    assert one.shape == (3, 17)
    for log, cond in ((log_snr, torch.tensor([1, 1, 1])), (log_snr + 1, torch.tensor([0, 1, 2]))):
        assert not torch.allclose(labels(features, log, cond)[0], one[0])
    assert torch.equal(labels(features, log_snr, None), labels(features, log_snr, torch.tensor([-1, -1, -1])))
    null = {"prompt_embeds": torch.zeros(1, 5, 4), "prompt_attention_mask": torch.ones(1, 5, dtype=torch.long)}
    words = told(null, None)
    cond = {**{k: v.expand(3, *v.shape[1:]) for k, v in null.items()}, "concat": torch.ones(3, 1, 8, 8)}
    plain = words(features, log_snr, cond)
    assert torch.equal(words(features, log_snr, {**cond, "concat": torch.zeros(3, 1, 8, 8)}), plain)
    assert not torch.allclose(words(features, log_snr, {**cond, "prompt_embeds": torch.ones(3, 5, 4)}), plain)
    assert told(None, None)(features, log_snr, None).shape == (3, 17)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="must be of as many levels"):
        LADD(probabilities=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"asks for more calls than there are levels, 4"):
        LADD(steps=(8,))
    with pytest.raises(ValueError, match="'nowhere' is no layer"):
        LADD(layers=("nowhere",)).networks(Start(teacher()))
