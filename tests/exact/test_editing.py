"""Zero-shot editing: orthonormal bases, measured coordinates kept, the right law for what is free."""

import math

import pytest
import torch

from fewstep.exact import ExactFlowMap, Gaussian
from fewstep.flow_maps import Jump
from fewstep.randomness import Rng
from fewstep.sampling import (
    Colorization,
    DPMSolverPP2M,
    Edited,
    Inpainting,
    Plan,
    SuperResolution,
    balanced,
    edit,
    measured,
    rollout,
    slerp,
    solve,
    stroke_to_image,
)
from fewstep.schedules import EDM, FlowMatching

SHAPE = (3, 4, 4)


def pictures(n=2, seed=0, shape=SHAPE):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2


def world(schedule):
    """Correlated Gaussian pictures."""
    d = math.prod(SHAPE)
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / d**0.5
    return Gaussian(schedule, torch.zeros(SHAPE), root @ root.T + 0.05 * torch.eye(d))


HALF = torch.zeros(4, 4)
HALF[:, :2] = 1
MEASUREMENTS = {
    "inpainting": Inpainting(HALF),
    "colourisation": Colorization(),
    "super-resolution": SuperResolution(2),
}


@pytest.fixture(params=MEASUREMENTS)
def measurement(request):
    return MEASUREMENTS[request.param]


@pytest.mark.parametrize("matrix", [Colorization().matrix, SuperResolution(2).matrix, SuperResolution(4).matrix])
def test_bases_are_orthonormal(matrix):
    """A A^T = I, and the first column has positive entries: a weighted mean."""
    assert float((matrix @ matrix.T - torch.eye(len(matrix))).abs().max()) < 1e-15 * len(matrix)
    assert float(matrix[:, 0].min()) > 0


def test_transforms_are_isometries(measurement):
    """A^T A x = x and the norm is kept."""
    x = pictures()
    z = measurement.transform(x)
    assert float((measurement.inverse(z) - x).abs().max()) < 1e-14
    assert float(z.norm()) == pytest.approx(float(x.norm()), rel=1e-14)


def test_the_known_coordinates_are_what_they_are_called():
    """Grey value, patch mean, left half."""
    x = pictures()
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)
    grey = torch.einsum("bchw,c->bhw", x, weights) / weights.norm()
    assert float((Colorization().measure(x)[:, 0] - grey).abs().max()) < 1e-15
    assert float(Colorization().measure(x)[:, 1:].abs().max()) == 0
    means = torch.nn.functional.avg_pool2d(x, 2)
    known = SuperResolution(2).measure(x)
    assert float((known[..., 0] - 2 * means).abs().max()) < 1e-15 and float(known[..., 1:].abs().max()) == 0
    assert torch.equal(Inpainting(HALF).measure(x), x * HALF)


def test_enlarge_gives_a_reference_with_the_small_picture_as_means():
    """The reference for super-resolution of a small picture."""
    small = pictures(shape=(3, 2, 2))
    assert float((torch.nn.functional.avg_pool2d(SuperResolution(2).enlarge(small), 2) - small).abs().max()) < 1e-15


def test_replace_keeps_known_and_free(measurement):
    """After a replacement the known coordinates are the reference's, the free ones untouched; twice is once."""
    x, y = pictures(seed=1), pictures(seed=2)
    out = measurement.replace(x, y)
    assert float((measurement.measure(out) - measurement.measure(y)).abs().max()) < 1e-15
    free_out, free_x = (measurement.transform(v) - measurement.measure(v) for v in (out, x))
    assert float((free_out - free_x).abs().max()) < 1e-15
    assert float((measurement.replace(out, y) - out).abs().max()) < 1e-15


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("schedule", [EDM(t_min=1e-3, t_max=20.0), FlowMatching()], ids=["edm", "flow"])
def test_edits_keep_the_measurement(measurement, gamma, schedule):
    """After a rollout of any kind the known coordinates equal the reference's: bits for inpainting, rounding else."""
    student = Jump(world(schedule))
    times = (float(schedule.t_max), *(schedule.time_at(torch.tensor([0.0, 1.0], dtype=torch.float64))).tolist())
    y = pictures()
    out = edit(student, y, measurement, Plan(times, gamma), Rng(0))
    if isinstance(measurement, Inpainting):
        assert torch.equal(out[..., :2], y[..., :2])
    assert float((measurement.measure(out) - measurement.measure(y)).abs().max()) < 1e-15
    assert float((out - y).abs().max()) > 0.1  # the free part is not the reference's


def test_replacement_happens_after_every_call():
    """Every call but the first starts from a state whose known coordinates are the reference's plus fresh noise."""
    schedule = EDM(t_min=1e-3, t_max=20.0)
    seen = []

    class Watched(Jump):
        def to_data(self, x, t, cond=None):
            seen.append(x)
            return super().to_data(x, t, cond)

    y = pictures(1).expand(4000, *SHAPE)
    edit(Watched(world(schedule)), y, Inpainting(HALF), Plan((20.0, 2.0, 0.5)), Rng(0))
    for x, t in zip(seen, (20.0, 2.0, 0.5), strict=True):
        known = (x - y)[..., :2]
        # 24 means of 4000 draws each: 4.5 standard errors
        assert float(known.mean(0).abs().max()) < 4.5 * t / 4000**0.5
        assert float(known.std()) == pytest.approx(t, rel=0.01)


def test_edits_start_from_the_noised_measurement(measurement):
    """The first state is the reference with its free coordinates at 0, plus noise."""
    seen = []

    class Watched(Jump):
        def to_data(self, x, t, cond=None):
            seen.append(x)
            return super().to_data(x, t, cond)

    y = pictures()
    edit(Watched(world(EDM())), y, measurement, Plan((2.0,)), Rng(3))
    start = measurement.inverse(measurement.measure(y)) + 2 * Rng(3).normal_like(y)
    assert float((seen[0] - start).abs().max()) < 1e-14


def test_jumps_that_stop_above_the_data_carry_the_noised_reference(measurement):
    """With gamma = 0 the known coordinates of every state in between are those of alpha y + sigma z, one z for all."""
    schedule, times = FlowMatching(), (1.0, 0.7, 0.2)
    seen = []

    class Watched(Jump):
        def forward(self, x, t, s, cond=None):
            seen.append(x)
            return super().forward(x, t, s, cond)

    y, z = pictures(), pictures(seed=7)
    edited = Edited(Watched(world(schedule)), measurement, y, z)
    rollout(edited, pictures(seed=8), Plan(times, gamma=0.0))
    for x, t in zip(seen[1:], times[1:], strict=True):
        noisy = (1 - t) * y + t * z
        assert float((measurement.measure(x) - measurement.measure(noisy)).abs().max()) < 1e-15


def test_bound_clamps_free_predictions_only():
    """Clamping comes before the replacement: measured values outside the bound stay."""
    y = 3 * pictures()
    out = edit(Jump(world(EDM())), y, Inpainting(HALF), Plan((80.0,)), Rng(0), bound=0.01)
    assert float(out[..., 2:].abs().max()) <= 0.01 and torch.equal(out[..., :2], y[..., :2])


def test_unmeasured_edit_is_plain_sampling():
    """With nothing known the student samples as usual: the law is the data's."""
    schedule = EDM(t_min=1e-3, t_max=200.0)
    data = Gaussian(schedule, torch.full((4,), 0.5), 0.25)
    y = torch.full((20000, 4), 9.0, dtype=torch.float64)
    out = edit(ExactFlowMap(data), y, Inpainting(torch.zeros(4)), Plan((200.0, 1.0)), Rng(0))
    assert float(out.mean()) == pytest.approx(0.5, abs=0.01) and float(out.std()) == pytest.approx(0.5, abs=0.01)


def test_stroke_to_image_starts_at_an_intermediate_time():
    """The student's first input is alpha y + sigma z at the plan's first time, on any schedule."""
    for schedule, t in ((EDM(), 3.0), (FlowMatching(), 0.6)):
        seen = []

        class Watched(Jump):
            def to_data(self, x, t, cond=None, seen=seen):
                seen.append(x)
                return super().to_data(x, t, cond)

        y = pictures()
        stroke_to_image(Watched(world(schedule)), y, Plan((t,)), Rng(4))
        time = torch.tensor([t, t], dtype=torch.float64)
        expected = schedule.add_noise(y, Rng(4).normal_like(y), time)
        assert float((seen[0] - expected).abs().max()) < 1e-14


def test_slerp():
    """The ends, the norm of orthogonal noises, per-sample weights, and parallel noises."""
    a, b = pictures(3, seed=1), pictures(3, seed=2)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-15) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-15)
    u = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    mixed = slerp(a, b, u)
    assert torch.allclose(mixed[0], a[0], atol=1e-15) and torch.allclose(mixed[2], b[2], atol=1e-15)
    e, f = torch.eye(2, dtype=torch.float64)[:, None]
    half = slerp(e, f, 0.5)
    assert half.flatten().tolist() == pytest.approx([0.5**0.5, 0.5**0.5], rel=1e-15)
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a, atol=1e-14)


def test_measured_hook_for_any_solver(measurement):
    """The same replacement on the denoiser's predictions: a solver that ends at pure data keeps the measurement."""
    schedule = FlowMatching()
    y, noise = pictures(), pictures(seed=9)
    times = balanced(schedule, 8)
    out = solve(world(schedule), noise, times, DPMSolverPP2M(), hooks=measured(measurement, y))
    assert float((measurement.measure(out) - measurement.measure(y)).abs().max()) < 1e-14
    assert not torch.allclose(out, solve(world(schedule), noise, times, DPMSolverPP2M()))


def test_refusals():
    """Channels, sides and factors that do not fit."""
    with pytest.raises(ValueError, match="3 channels"):
        Colorization().transform(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="multiples of it"):
        SuperResolution(3).transform(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="factor=1"):
        SuperResolution(1)
    jump = Edited(Jump(world(EDM())), Inpainting(HALF), pictures(), pictures())
    assert jump.shape == SHAPE
