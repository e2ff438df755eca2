"""LowDiff: the cascade where every stage is known, the network before training, what training feeds it, and the count
of effective calls."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import ConditionalGaussian, Gaussian
from fewstep.hub import native
from fewstep.methods.method import Batch, Progress
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.methods.teachers.lowdiff import LowDiff, condition, stage_loss
from fewstep.networks import CascadeUNet, UNet
from fewstep.predictions import EDMPrediction, TrigPrediction
from fewstep.randomness import Rng, derive_seed
from fewstep.sampling import sample
from fewstep.sampling.cascade import (
    Cascade,
    StagePlan,
    WithPicture,
    area_costs,
    downsample,
    effective_calls,
    flop_costs,
    sample_cascade,
    stage_schedule,
    upsample,
)
from fewstep.schedules import EDM, FlowMatching, TrigFlow, VPLinear

# Noise so large that what the start state lacks of the data, of relative size 1 / t_max, does not show.
FAR = EDM(t_max=5000.0)
SMALL = {"channels": (8, 16), "blocks": 1, "width": 16}


def pooling(shape, size):
    """Averaging over areas as a matrix on flattened samples."""
    d = math.prod(shape)
    return downsample(torch.eye(d, dtype=torch.float64).reshape(d, *shape), size).flatten(1).T


def covariance_of_pictures(shape):
    """Neighbours and channels that go together, pixels of different size."""
    c, h, w = shape
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).double()
    near = torch.exp(-torch.cdist(places, places) / 2)
    channels = 0.7 * torch.eye(c, dtype=torch.float64) + 0.3
    size = 0.3 + 0.5 * torch.rand(c * h * w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.kron(channels, near) * size[:, None] * size


def gaussian_cascade(schedule, mean, covariance, heights):
    """The exact denoisers of every resolution given the one below, for pictures of one Gaussian law."""
    c, h, w = shape = tuple(mean.shape)
    stages = []
    for k, r in enumerate(heights):
        size = (c, r, w * r // h)
        pool = pooling(shape, size[1:])
        low_mean, low = (pool @ mean.flatten()).reshape(size), pool @ covariance @ pool.T
        low, own = (low + low.T) / 2, stage_schedule(schedule, r / h)
        if k:
            below = pooling(size, (heights[k - 1], w * heights[k - 1] // h))
            stages.append(ConditionalGaussian(own, low_mean, low, below))
        else:
            stages.append(Gaussian(own, low_mean, low))
    return Cascade(tuple(stages))


def affine(cascade, plans):
    """Mean and covariance of what the sampler makes, exactly: with Gaussian denoisers it is affine in the noise."""
    sizes = [math.prod(stage.shape) for stage in cascade.stages]
    rows = torch.eye(sum(sizes) + 1, sum(sizes), dtype=torch.float64)  # the last row is no noise at all
    noise = [part.reshape(-1, *stage.shape) for part, stage in zip(rows.split(sizes, 1), cascade.stages, strict=True)]
    made = sample_cascade(cascade, len(rows), plans, noise=noise)[-1].flatten(1)
    jacobian = made[:-1] - made[-1]
    return made[-1], jacobian.T @ jacobian


def relative(a, b):
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(b))


MEAN = torch.linspace(-0.5, 0.5, 16, dtype=torch.float64).reshape(1, 4, 4)
COVARIANCE = covariance_of_pictures((1, 4, 4))


# -- pictures -----------------------------------------------------------------------------------------------------


def test_averages_over_areas_and_their_inverse():
    """Each value is the mean of its area, also on areas that are not square; enlarging is undone exactly."""
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).reshape(2, 3, 4, 6)
    low = downsample(x, (2, 2))
    assert low.shape == (2, 3, 2, 2)
    assert torch.allclose(low[1, 2, 1, 0], x[1, 2, 2:4, 0:3].mean(), atol=1e-15)
    assert torch.allclose(downsample(upsample(low, (4, 6)), (2, 2)), low, atol=1e-15)
    assert torch.allclose(downsample(downsample(x, (2, 6)), (1, 2)), downsample(x, (1, 2)), atol=1e-13)
    with pytest.raises(ValueError, match="4x6 does not average to 3x3"):
        downsample(x, (3, 3))
    with pytest.raises(ValueError, match="2x2 does not enlarge to 3x4"):
        upsample(low, (3, 4))


@pytest.mark.parametrize("schedule", [EDM(), VPLinear(), TrigFlow(), FlowMatching(t_max=0.98)])
def test_a_stages_schedule_ends_where_averaged_noise_does(schedule):
    """The greatest noise level is that of the full picture times the ratio of the heights, the rest is the same."""
    low = stage_schedule(schedule, 0.25)
    ends = torch.tensor([schedule.t_max, low.t_max], dtype=torch.float64)
    top, lowest = schedule.ratio(ends).tolist()
    assert lowest == pytest.approx(0.25 * top, rel=1e-9)
    t = torch.tensor([0.3 * low.t_max], dtype=torch.float64)
    assert torch.equal(low.alpha(t), schedule.alpha(t)) and torch.equal(low.sigma(t), schedule.sigma(t))
    assert stage_schedule(schedule, 1.0) == schedule


# -- (a) the Gaussian cascade -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.0, 0.4, math.inf])
def test_the_conditional_denoiser_is_the_regression_on_both_observations(s):
    """``E[x_0 | x_t, y]`` by plain joint-Gaussian regression on ``(x_t, A x_0 + s n)``, on several schedules."""
    pool = pooling((1, 4, 4), (2, 2))
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 4, 4, generator=gen, dtype=torch.float64)
    beside = upsample(torch.randn(5, 1, 2, 2, generator=gen, dtype=torch.float64), (4, 4))
    for schedule, t in ((EDM(), 0.7), (VPLinear(), 0.4), (FlowMatching(), 0.6)):
        world = ConditionalGaussian(EDM(), MEAN, COVARIANCE, pool).on(schedule)
        alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (schedule.alpha, schedule.sigma))
        look = torch.cat([alpha * torch.eye(16, dtype=torch.float64), pool if s < math.inf else 0 * pool])
        noise = torch.diag(torch.cat([torch.full((16,), sigma**2), torch.full((4,), min(s, 1.0) ** 2)]).double())
        seen = torch.cat([x.flatten(1), beside.flatten(1) @ pool.T], 1) - (look @ MEAN.flatten())
        inverse = torch.linalg.pinv(look @ COVARIANCE @ look.T + noise, hermitian=True)
        expected = MEAN.flatten() + seen @ inverse @ look @ COVARIANCE
        got = world(x, t, beside=beside, augmentation=torch.full((5,), s))
        assert torch.allclose(got.flatten(1), expected, atol=1e-10)
    plain = Gaussian(EDM(), MEAN, COVARIANCE)(x, 0.7)
    assert torch.allclose(ConditionalGaussian(EDM(), MEAN, COVARIANCE, pool)(x, 0.7), plain, atol=1e-12)


def test_clean_data_that_agrees_with_the_observation_is_left_alone():
    """At no noise the denoiser is the identity on samples with ``A x = y``, and keeps ``y`` where they do not agree."""
    world = ConditionalGaussian(EDM(), MEAN, COVARIANCE, pooling((1, 4, 4), (2, 2)))
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low = downsample(x, (2, 2))
    assert torch.allclose(world(x, 0.0, beside=upsample(low, (4, 4))), x, atol=1e-10)
    other = world(x, 0.0, beside=upsample(low + 1, (4, 4)))
    assert torch.allclose(downsample(other, (2, 2)), low + 1, atol=1e-12)


def test_the_cascade_samples_the_data_law_and_keeps_the_low_picture():
    """Two stages make the covariance of the data within 0.9 % (2e5 samples; drawing from the law itself leaves 0.7 %),
    and averaging the result gives the low picture back to rounding: the wiring of the condition is exact."""
    cascade = gaussian_cascade(EDM(), MEAN, COVARIANCE, (2, 4))
    low, high = sample_cascade(cascade, 200_000, [StagePlan(36), StagePlan(36)])
    assert relative(torch.cov(high.flatten(1).T), COVARIANCE) < 0.009
    assert float((downsample(high, (2, 2)) - low).abs().max()) < 1e-12
    # not so when stage two is shown another picture than the one that it is held to
    assert float((downsample(high, (2, 2)) - low.roll(1, 0)).abs().max()) > 1


@pytest.mark.parametrize(("shape", "heights"), [((1, 4, 4), (2, 4)), ((1, 8, 8), (2, 4, 8)), ((2, 4, 8), (1, 2, 4))])
def test_the_law_of_the_cascade_is_exact_up_to_the_solver(shape, heights):
    """Mean and covariance without sampling error: two and three stages, two channels, oblong pictures.  What is left
    is the solver's, and falls faster than the square of the number of steps."""
    covariance = covariance_of_pictures(shape)
    mean = torch.linspace(-0.5, 0.5, len(covariance), dtype=torch.float64).reshape(shape)
    cascade = gaussian_cascade(FAR, mean, covariance, heights)
    errors = []
    for steps in (40, 160):
        got_mean, got = affine(cascade, [StagePlan(steps)] * len(heights))
        errors.append(relative(got, covariance))
        assert relative(got_mean, mean.flatten()) < 1e-3
    assert errors[1] < 2e-4 and errors[1] < errors[0] / 16


def test_a_noisy_condition_that_is_told_leaves_the_law_and_loosens_the_hold():
    """Noise s on the condition: the result has the covariance of the data still, and its average differs from the low
    picture by twice the variance of the low picture given the noisy one."""
    cascade = gaussian_cascade(EDM(), MEAN, COVARIANCE, (2, 4))
    s = 0.4
    low, high = sample_cascade(cascade, 50_000, [StagePlan(36), StagePlan(36, augmentation=s)])
    assert relative(torch.cov(high.flatten(1).T), COVARIANCE) < 0.025  # 5e4 samples of the law itself leave 1.5 %
    pool = pooling((1, 4, 4), (2, 2))
    law = pool @ COVARIANCE @ pool.T
    left = law - law @ torch.linalg.inv(law + s**2 * torch.eye(4)) @ law
    gap = (downsample(high, (2, 2)) - low).flatten(1).square().sum(1).mean()
    assert float(gap) == pytest.approx(float(2 * left.trace()), rel=0.02)


def test_a_partial_start_keeps_the_low_picture_and_nears_the_law_from_above():
    """Starting at less noise from the enlarged picture costs accuracy of the law, less the higher it starts, and
    nothing of the hold on the low picture."""
    cascade = gaussian_cascade(FAR, MEAN, COVARIANCE, (2, 4))
    errors = []
    for start in (0.2, 1.0, 5.0, 25.0):
        plans = [StagePlan(80), StagePlan(80, start=start)]
        errors.append(relative(affine(cascade, plans)[1], COVARIANCE))
        low, high = sample_cascade(cascade, 10, plans)
        assert float((downsample(high, (2, 2)) - low).abs().max()) < 1e-12
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3 and errors[-1] < 0.006  # measured 0.34, 0.12, 0.024, 0.0048


def test_a_partial_start_begins_at_the_picture_with_that_much_noise():
    """The first state that the network sees is ``alpha y + sigma n`` at ``sigma / alpha = start``."""
    seen = []

    class Watched(ConditionalGaussian):
        def forward(self, x, t, cond=None, beside=None, augmentation=0.0):
            seen.append((x, float(torch.as_tensor(t).flatten()[0]), beside))
            return super().forward(x, t, cond, beside, augmentation)

    for schedule in (EDM(), VPLinear()):
        seen.clear()
        two = gaussian_cascade(schedule, MEAN, COVARIANCE, (2, 4))
        watched = Watched(schedule, MEAN, COVARIANCE, pooling((1, 4, 4), (2, 2)))
        noise = [torch.zeros(3, 1, 2, 2, dtype=torch.float64), torch.ones(3, 1, 4, 4, dtype=torch.float64)]
        sample_cascade(Cascade((two.stages[0], watched)), 3, [StagePlan(4), StagePlan(4, start=0.8)], noise=noise)
        x, t, beside = seen[0]
        time = torch.tensor(t, dtype=torch.float64)
        assert float(schedule.ratio(time)) == pytest.approx(0.8, rel=1e-9)
        assert torch.allclose(x, schedule.alpha(time) * beside + schedule.sigma(time) * noise[1], atol=1e-12)


def test_latents_of_a_linear_autoencoder_cascade_as_pictures_do():
    """Pictures in 2x2 patches, three of four principal directions kept: the cascade over averaged latents, decoded,
    has the covariance of the pictures' reconstructions, and its latents average to the low latents."""
    shape = (1, 8, 8)
    covariance = covariance_of_pictures(shape)
    fold = nn.functional.pixel_unshuffle(torch.eye(64, dtype=torch.float64).reshape(64, *shape), 2).flatten(1).T
    patches = fold @ covariance @ fold.T
    within = sum(patches[i::16, i::16] for i in range(16)) / 16  # the mean covariance of a patch
    directions = torch.linalg.eigh(within)[1][:, 1:].T
    encode = torch.kron(directions, torch.eye(16, dtype=torch.float64)) @ fold
    latent = encode @ covariance @ encode.T
    cascade = gaussian_cascade(FAR, torch.zeros(3, 4, 4, dtype=torch.float64), (latent + latent.T) / 2, (2, 4))
    got = affine(cascade, [StagePlan(160)] * 2)[1]
    reconstruct = encode.T @ encode
    assert relative(encode.T @ got @ encode, reconstruct @ covariance @ reconstruct) < 2e-4
    low, high = sample_cascade(cascade, 10, [StagePlan(10)] * 2)
    assert float((downsample(high, (2, 2)) - low).abs().max()) < 1e-12


# -- (b) one stage is the plain model ---------------------------------------------------------------------------------


def randomised(net, seed=0):
    """The network with random weights in place of zeros, but for those of the extra inputs and the condition."""
    gen = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        if not bool(parameter.any()) and "extras" not in name and "beside" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=gen) * 0.1)  # keeps the memory layout
    return net


def plain_unet(classes=None):
    torch.manual_seed(0)
    return randomised(UNet((1, 8, 8), classes=classes, **SMALL))


@pytest.mark.parametrize("resolutions", [(8,), (4, 8)])
def test_the_highest_stage_is_the_plain_network(resolutions):
    """A cascade made from a U-Net gives, at the height of the pictures and without a condition, the U-Net's output to
    the bit, features too."""
    net = plain_unet(classes=3)
    cascade = CascadeUNet.from_unet(net, resolutions)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, -1])
    assert torch.equal(cascade(x, t, labels), net(x, t, labels))
    assert torch.equal(cascade.features(x, t, labels), net.features(x, t, labels))


def test_one_stage_trains_and_samples_as_the_plain_model():
    """K = 1: the loss of an iteration is that of plain denoising and the samples are those of ``sample``, to the
    bit."""
    net = plain_unet(classes=3)
    plain = NetworkDenoiser(net, TrigFlow(), TrigPrediction(), (1, 8, 8), 3)
    x, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    losses = []
    for method in (Denoising(), LowDiff(resolutions=(8,))):
        nets = method.networks(Start(plain))
        (update,) = method.updates(nets, Batch(x, labels, Rng(0)), Progress())
        losses.append(update.loss)
    assert torch.equal(losses[0], losses[1]) and float(losses[0].detach()) > 0.1
    cascade = Cascade.shared(NetworkDenoiser(CascadeUNet.from_unet(net, (8,)), TrigFlow(), TrigPrediction(),
                                             (1, 8, 8), 3), (8,))  # fmt: skip
    (made,) = sample_cascade(cascade, 5, [StagePlan(3, "ddpm", guidance=1.5)], seed=4)
    assert torch.equal(made, sample(plain, 5, solver="ddpm", steps=3, guidance=1.5, seed=4))


@pytest.mark.parametrize("height", [4, 8])
def test_condition_and_embeddings_start_without_effect_and_then_have_one(height):
    """Before training the picture, its noise level and the resolution change nothing; with their layers moved, they
    do, and an infinite noise level hides the picture."""
    torch.manual_seed(0)
    net = randomised(CascadeUNet((1, 8, 8), (2, 4, 8), channels=(8, 16, 8), blocks=1, width=16))
    x, t, picture = torch.randn(3, 1, height, height), torch.rand(3), torch.randn(3, 1, height, height)
    level, none = torch.full((3,), 0.2), torch.full((3,), math.inf)
    plain = net(x, t)
    assert torch.equal(net(x, t, beside=picture, augmentation=level), plain)
    side = net.beside if height == 8 else net.besides["4"]
    nn.init.normal_(side.layer.weight)
    seen = net(x, t, beside=picture)
    assert not torch.allclose(seen, plain, atol=1e-3)
    assert torch.equal(net(x, t, beside=picture, augmentation=none), plain)
    mixed = net(x, t, beside=picture, augmentation=torch.tensor([0.0, math.inf, 0.0]))
    assert torch.allclose(mixed[[0, 2]], seen[[0, 2]], atol=1e-6) and torch.allclose(mixed[1], plain[1], atol=1e-6)
    nn.init.normal_(net.conditioning.extras["augmentation"].weight)
    after = net(x, t, beside=picture, augmentation=level)
    assert not torch.allclose(after, seen, atol=1e-3)
    assert not torch.allclose(net(x, t, beside=picture, augmentation=2 * level), after, atol=1e-3)
    assert not torch.allclose(net(x, t, beside=picture, augmentation=none), net(x, t, beside=0 * picture), atol=1e-3)
    assert torch.equal(net(x, t, beside=picture, augmentation=none), net(x, t))
    other = torch.randn(3, 1, 12 - height, 12 - height)
    assert torch.equal(net.inputs(x, t, None, None, {})[0], net.inputs(other, t, None, None, {})[0])
    nn.init.normal_(net.conditioning.extras["resolution"].weight)
    assert not torch.allclose(net.inputs(x, t, None, None, {})[0], net.inputs(other, t, None, None, {})[0], atol=1e-3)
    assert not torch.allclose(net(x, t, beside=picture, augmentation=level), after, atol=1e-3)


def test_the_stages_share_what_lies_below_them():
    """A loss at 4x4 reaches its own first and last layer, the embedding and the lower level, and no layer of the upper
    one; views of a cascade hold one network."""
    net = randomised(CascadeUNet((1, 8, 8), **SMALL))
    net(torch.randn(2, 1, 4, 4), torch.rand(2)).sum().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {"stems.4.weight", "heads.4.2.weight", "down.2.conv_1.weight", "middle.0.conv_1.weight"} <= moved
    assert not any(name.startswith(("enter", "leave", "down.0", "down.1", "up.3", "up.4", "beside")) for name in moved)
    model = NetworkDenoiser(net, EDM(), EDMPrediction(), (1, 8, 8))
    low, high = Cascade.shared(model, net.resolutions).stages
    assert low.net is high.net is net and low.shape == (1, 4, 4)
    assert low.schedule.t_max == pytest.approx(40) and high.schedule == EDM()


def test_a_cascade_is_saved_and_read(tmp_path):
    """The folder holds resolutions and weights; the model that is read gives the same at every stage."""
    net = randomised(CascadeUNet((1, 8, 16), (2, 8), channels=(8, 8, 8), blocks=1, width=16, classes=2))
    model = NetworkDenoiser(net, TrigFlow(), TrigPrediction(), (1, 8, 16), 2)
    native.save(model, tmp_path)
    again = native.load(tmp_path)
    assert isinstance(again.net, CascadeUNet) and again.net.resolutions == (2, 8)
    for h in (2, 8):
        x, labels = torch.randn(3, 1, h, 2 * h), torch.tensor([0, 1, -1])
        assert torch.equal(again(x, 0.5, labels), model(x, 0.5, labels))


# -- (c) the count ----------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """A network that runs whole at every resolution."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 1, 3, padding=1))

    def forward(self, x, t, cond=None, beside=None, augmentation=None):
        return self.layers(x)


def test_convolutions_cost_as_their_area():
    """The counted operations of a fully convolutional network go as ``(R_k / R)^2``, exactly."""
    cascade = Cascade.shared(NetworkDenoiser(Convolutions(), EDM(), EDMPrediction(), (1, 16, 16)), (4, 8, 16))
    assert flop_costs(cascade) == area_costs(cascade) == (1 / 16, 1 / 4, 1.0)


def test_effective_calls_are_the_operations_of_sampling():
    """``sum_k n_k FLOPs_k / FLOPs_K`` is the number of operations that sampling one picture takes, counted, over those
    of one call at the highest stage: guidance, two-stage solvers and a partial start included."""
    net = CascadeUNet((1, 16, 16), (4, 8, 16), channels=(8, 16, 16), blocks=1, width=16, classes=2)
    cascade = Cascade.shared(NetworkDenoiser(net, EDM(), EDMPrediction(), (1, 16, 16), 2), net.resolutions)
    plans = [StagePlan(5, guidance=2.0), StagePlan(3, "heun"), StagePlan(2, start=1.0, guidance=1.5)]
    with FlopCounterMode(display=False) as counter:
        sample_cascade(cascade, 1, plans)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        net(torch.zeros(1, 1, 16, 16), torch.zeros(1), beside=torch.zeros(1, 1, 16, 16))
    costs = flop_costs(cascade)
    assert [plan.calls(s.schedule) for plan, s in zip(plans, cascade.stages, strict=True)] == [10, 5, 4]
    counted = counter.get_total_flops() / one.get_total_flops()
    assert effective_calls(cascade, plans, costs) == pytest.approx(counted, rel=1e-12)
    assert effective_calls(cascade, plans, (0.1, 0.2, 1.0)) == pytest.approx(10 * 0.1 + 5 * 0.2 + 4)
    assert costs[0] < costs[1] < costs[2] == 1


# -- (d) what training feeds the network ------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A network that keeps what it is given."""

    resolutions = (2, 4, 8)

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, cond=None, beside=None, augmentation=None):
        self.given = SimpleNamespace(x=x, t=t, cond=cond, beside=beside, augmentation=augmentation)
        return self.gain * x


def only(k):
    """Shares that always draw stage k."""
    return tuple(1 - 2e-12 if i == k else 1e-12 for i in range(3))


def feed(method, x, labels=None, seed=0):
    """One update of a method on a recorder: the update and what the network was given."""
    net = Recorder()
    nets = SimpleNamespace(model=NetworkDenoiser(net, EDM(t_min=1e-9, t_max=1e9), EDMPrediction(), (1, 8, 8), 3))
    (update,) = method.updates(nets, Batch(x, labels, Rng(seed)), Progress())
    return update, net.given


def test_the_condition_is_the_averaged_data():
    """Without noise the condition of stage k is the picture averaged to stage k - 1 and enlarged, so averaging the
    stage's own picture gives exactly it; the lowest stage has none."""
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    for k, r in enumerate(Recorder.resolutions):
        _, given = feed(LowDiff(shares=only(k), augmentation_max=0.0, picture_dropout=0.0, noise_std=0.0,
                                noise_mean=-15.0), x)  # fmt: skip
        assert given.x.shape == (5, 1, r, r)
        if k == 0:
            assert given.beside is None and given.augmentation is None
            continue
        assert torch.equal(given.beside, upsample(downsample(downsample(x, (r, r)), (r // 2, r // 2)), (r, r)))
        # at this little noise the network's input is the stage's picture over sigma_data
        assert torch.allclose(
            downsample(given.x / 2, (r // 2,) * 2), downsample(given.beside, (r // 2,) * 2), atol=1e-5
        )
        assert torch.equal(given.augmentation, torch.zeros(5, dtype=torch.float64))


def test_noise_is_drawn_at_each_resolution_and_shifted_with_it():
    """The same draws at half of the height stand at half of the noise level, and the noise there is white with the
    full deviation: no noisy picture is averaged."""
    data, levels = torch.zeros(400, 1, 8, 8, dtype=torch.float64), []
    for k in range(3):
        _, given = feed(LowDiff(shares=only(k)), data)
        sigma = torch.exp(4 * given.t)  # EDM's time input is log(sigma) / 4
        noise = given.x * torch.sqrt(sigma**2 + 0.25)[:, None, None, None] / sigma[:, None, None, None]
        assert float(noise.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * noise.numel()))
        levels.append(sigma)
    assert torch.allclose(levels[0] * 4, levels[2], rtol=1e-9) and torch.allclose(levels[1] * 2, levels[2], rtol=1e-9)
    _, unshifted = feed(LowDiff(shares=only(0), shift=0.0), data)
    assert torch.allclose(torch.exp(4 * unshifted.t), levels[2], rtol=1e-9)


def test_the_condition_carries_the_noise_that_the_network_is_told():
    """``Up(x + s n)`` with n white at the *low* resolution and s uniform up to the greatest; a share is told that there
    is none."""
    low = torch.zeros(4000, 1, 2, 2, dtype=torch.float64)
    beside, s = condition(low, (4, 4), 0.3, 0.25, Rng(0))
    absent = torch.isinf(s)
    assert float(absent.double().mean()) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    known = s[~absent]
    assert 0 <= float(known.min()) < 0.01 and 0.29 < float(known.max()) < 0.3
    assert float(known.mean()) == pytest.approx(0.15, abs=4 * 0.3 / math.sqrt(12 * 3000))
    noise = downsample(beside, (2, 2))
    assert torch.equal(upsample(noise, (4, 4)), beside)
    white = noise[~absent] / known[:, None, None, None]
    assert float(white.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * white.numel()))
    _, given = feed(LowDiff(shares=only(1), picture_dropout=1.0), torch.rand(4, 1, 8, 8))
    assert bool(torch.isinf(given.augmentation).all())


def test_labels_are_dropped_and_stages_are_drawn_by_their_shares():
    """The null label for the asked share; over many iterations every resolution as often as its share, and a weight of
    one over K times the share (or the given one)."""
    labels = torch.arange(2000) % 3
    _, given = feed(LowDiff(shares=only(2), label_dropout=0.2), torch.rand(2000, 1, 8, 8), labels)
    assert float((given.cond == -1).double().mean()) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 2000))
    method = LowDiff(shares=(0.5, 0.3, 0.2))
    drawn = torch.tensor([method.draw_stage(3, Rng("stage", i)) for i in range(2000)])
    counts = torch.bincount(drawn, minlength=3) / 2000
    assert torch.allclose(counts, torch.tensor(method.shares), atol=4 * 0.5 / math.sqrt(2000))
    x = torch.rand(4, 1, 8, 8)
    for weights, expected in (((), {2: 1 / 1.5, 4: 1 / 0.9, 8: 1 / 0.6}), ((1.0, 2.0, 3.0), {2: 1.0, 4: 2.0, 8: 3.0})):
        update, given = feed(LowDiff(shares=method.shares, weights=weights), x, seed=int(weights == ()))
        r = given.x.shape[-1]
        assert float(update.loss.detach()) == pytest.approx(expected[r] * float(update.logs[f"loss_{r}"]), rel=1e-6)


def test_a_batch_in_two_parts_is_the_whole_batch():
    """Micro-batches and processes draw the same stage, times, noise and conditions as one batch: their losses average
    to its own, at every stage."""
    torch.manual_seed(0)
    net = randomised(CascadeUNet((1, 8, 8), classes=3, **SMALL))
    method = LowDiff()
    nets = method.networks(Start(NetworkDenoiser(net, TrigFlow(), TrigPrediction(), (1, 8, 8), 3)))
    x, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 3
    stages = set()
    for step in range(6):
        (whole,) = method.updates(nets, Batch(x, labels, Rng(step)), Progress())
        halves = [
            next(method.updates(nets, Batch(x[half], labels[half], Rng(step, part=i, parts=2)), Progress()))
            for i, half in enumerate((slice(0, 4), slice(4, 8)))
        ]
        mean = sum(half.loss.detach() for half in halves) / 2
        assert torch.allclose(mean, whole.loss.detach(), rtol=1e-5)
        stages |= set(whole.logs)
    assert stages == {"loss_4", "loss_8"}


class AroundExact(nn.Module):
    """``a D + b beside + c x`` with D exact: a, b, c = 1, 0, 0 is the minimum of the loss."""

    def __init__(self, world, a=1.0):
        super().__init__()
        self.world = world
        self.weights = nn.Parameter(torch.tensor([a, 0.0, 0.0], dtype=torch.float64))

    def forward(self, x, t, cond=None, beside=None, augmentation=0.0):
        sigma = torch.exp(4 * t)
        power = (sigma**2 + 0.25)[:, None, None, None]
        state = x * power.sqrt()
        with torch.no_grad():
            x0 = self.world(state, sigma, beside=beside, augmentation=augmentation)
        a, b, c = self.weights
        guess = a * x0 + b * (0 if beside is None else beside) + c * state
        # what the preconditioning makes of it is the guess again
        return (guess - 0.25 / power * state) / (sigma[:, None, None, None] * 0.5 / power.sqrt())


@pytest.mark.parametrize("s", [0.0, 0.3])
def test_the_exact_conditional_denoiser_is_stationary(s):
    """At ``E[x_0 | x_t, y]`` the gradient of the loss is zero within its sampling error, in every direction that mixes
    prediction, condition and state; 10 % off it is not."""
    cascade = gaussian_cascade(EDM(), MEAN, COVARIANCE, (2, 4))
    data = Gaussian(EDM(), MEAN, COVARIANCE)

    def scores(a):
        model = NetworkDenoiser(AroundExact(cascade.stages[1], a), EDM(), EDMPrediction(), (1, 4, 4))
        gradients = []
        for i in range(60):
            rng = Rng("stationary", i)
            x = data.sample(256, rng)
            low = downsample(x, (2, 2))
            beside = upsample(low + s * rng.normal_like(low), (4, 4))
            t = torch.exp(rng.normal(256, dtype=torch.float64) - 1)
            loss = stage_loss(model, x, t, None, rng, beside, torch.full((256,), s))
            gradients.append(torch.autograd.grad(loss, model.net.weights)[0])
        stacked = torch.stack(gradients)
        # a gradient that is 0 in exact arithmetic has no sampling error to measure its rounding by
        return stacked.mean(0) / stacked.std(0).clamp_min(1e-9) * math.sqrt(60)

    assert float(scores(1.0).abs().max()) < 4
    assert float(scores(0.9).abs().min()) > 8


# -- guidance and errors ----------------------------------------------------------------------------------------------


def test_guidance_by_the_picture_moves_away_from_the_unconditional_stage():
    """``D(x) + w (D(x, y) - D(x))``; w = 1 is the plain cascade."""
    cascade = gaussian_cascade(EDM(), MEAN, COVARIANCE, (2, 4))
    plans = [StagePlan(5), StagePlan(5)]
    plain = sample_cascade(cascade, 4, plans)[1]
    once = sample_cascade(cascade, 4, [plans[0], StagePlan(5, picture_guidance=1.0)])[1]
    assert torch.allclose(once, plain, atol=1e-12)
    low = sample_cascade(cascade, 4, plans)[0]
    high = cascade.stages[1]
    guided = sample_cascade(cascade, 4, [plans[0], StagePlan(1, "ddim", picture_guidance=3.0)])[1]
    noise = noise_of_the_second_stage()
    with_picture = WithPicture(high, upsample(low, (4, 4)), 0.0)(80 * noise, 80.0)
    expected = high(80 * noise, 80.0) + 3 * (with_picture - high(80 * noise, 80.0))
    assert torch.allclose(guided, expected, atol=1e-9)


def noise_of_the_second_stage():
    """What the second stage, four samples of 4x4, starts from with seed 0."""
    return Rng(derive_seed(0, "stage", 1), "sample").normal(4, 1, 4, 4, dtype=torch.float64)


def test_impossible_cascades_and_plans_are_refused():
    """One line that names what is wrong."""
    cascade = gaussian_cascade(EDM(), MEAN, COVARIANCE, (2, 4))
    low, high = cascade.stages
    with pytest.raises(ValueError, match=r"\[1, 4, 4\] .* cannot stand below one of \[1, 2, 2\]"):
        Cascade((high, low))
    with pytest.raises(ValueError, match="one denoiser or more"):
        Cascade(())
    with pytest.raises(ValueError, match="1 plans for a cascade of 2 stages"):
        sample_cascade(cascade, 2, [StagePlan()])
    with pytest.raises(ValueError, match="1 tensors of noise"):
        sample_cascade(cascade, 2, [StagePlan(), StagePlan()], noise=[torch.zeros(2, 1, 2, 2)])
    with pytest.raises(ValueError, match="first stage has none below"):
        sample_cascade(cascade, 2, [StagePlan(start=1.0), StagePlan()])
    with pytest.raises(ValueError, match="start=100 is no noise level between"):
        sample_cascade(cascade, 2, [StagePlan(), StagePlan(start=100.0)])
    with pytest.raises(ValueError, match="no classes"):
        sample_cascade(cascade, 2, [StagePlan(), StagePlan(guidance=2.0)])
    with pytest.raises(ValueError, match="augmentation=-1"):
        StagePlan(augmentation=-1)
    with pytest.raises(ValueError, match="one noise level for the whole batch"):
        high(torch.zeros(2, 1, 4, 4), 1.0, beside=torch.zeros(2, 1, 4, 4), augmentation=torch.tensor([0.1, 0.2]))


def test_impossible_networks_and_methods_are_refused():
    """One line that names the argument and what would be right."""
    with pytest.raises(ValueError, match=r"resolutions=\[2, 8\]: a U-Net of 2 levels .* works at 4, 8"):
        CascadeUNet((1, 8, 8), (2, 8), **SMALL)
    for wrong in ((8, 4), (4,), (3, 8), (0, 8)):
        with pytest.raises(ValueError, match="resolutions="):
            CascadeUNet((1, 8, 8), wrong, **SMALL)
    net = CascadeUNet((1, 8, 8), **SMALL)
    with pytest.raises(ValueError, match=r"6x6 is none of this cascade's resolutions \[4, 8\]"):
        net(torch.zeros(1, 1, 6, 6), torch.ones(1))
    with pytest.raises(ValueError, match="lowest stage, 4 pixels high"):
        net(torch.zeros(1, 1, 4, 4), torch.ones(1), beside=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="takes a second sample already"):
        CascadeUNet.from_unet(UNet((1, 8, 8), beside=1, **SMALL))
    world = Gaussian(EDM(), MEAN, COVARIANCE)
    with pytest.raises(ValueError, match="another network"):
        LowDiff().networks(Start(world))
    model = NetworkDenoiser(net, EDM(), EDMPrediction(), (1, 8, 8))
    with pytest.raises(ValueError, match=r"weights=\[1.0\] for the resolutions \[4, 8\]"):
        LowDiff(weights=(1.0,)).networks(Start(model))
    with pytest.raises(ValueError, match="shares="):
        LowDiff(shares=(0.5, 0.6))
    with pytest.raises(ValueError, match="picture_dropout=2"):
        LowDiff(picture_dropout=2.0)
    with pytest.raises(ValueError, match="augmentation_max=-1"):
        LowDiff(augmentation_max=-1.0)
