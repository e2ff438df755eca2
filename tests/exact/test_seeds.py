"""One seed a sample: sample k is what it would be alone, bit for bit where the network allows, whatever draws noise."""

import pytest
import torch
from torch import nn

from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.flow_maps import Jump
from fewstep.networks import MLP
from fewstep.predictions import V
from fewstep.randomness import PerSample, Rng
from fewstep.sampling import Plan, Student, sample
from fewstep.schedules import EDM, TrigFlow, align, as_time


class Normal(Denoiser):
    """The exact denoiser of data from N(0, 1), element by element, so that no sum depends on the batch."""

    def __init__(self):
        super().__init__(EDM(), (2, 5))
        self.register_buffer("kind", torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, cond=None):
        return x / (1 + align(as_time(t, x) ** 2, x))


WORLD = Normal()


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.mark.parametrize("one_path", [False, True], ids=["fresh", "one path"])
@pytest.mark.parametrize("solver", ["unipc", "ddpm", "dpmpp-3m-sde", "dpmpp-sde", "heun:churn=20"])
def test_a_sample_does_not_depend_on_the_others(solver, one_path):
    """Drawn alone, with others and in another place it is the same."""
    how = {"solver": solver, "steps": 6, "one_path": one_path}
    three = sample(WORLD, 3, seeds=[3, 5, 7], **how)
    alone = [sample(WORLD, 1, seeds=[s], **how) for s in (3, 5, 7)]
    assert torch.equal(three, torch.cat(alone))
    assert torch.equal(sample(WORLD, 2, seeds=[7, 3], **how), three[[2, 0]])
    assert torch.equal(sample(WORLD, 1, seed=5, **how), three[1:2])
    assert len(three.unique()) == 30


@pytest.mark.parametrize("one_path", [False, True], ids=["fresh", "one path"])
@pytest.mark.parametrize("solver", ["unipc", "ddpm", "heun:churn=20"])
def test_a_generator_a_sample(solver, one_path):
    """The same for generators of the caller's, and one for all is a seed for all."""
    how = {"solver": solver, "steps": 6, "one_path": one_path}
    three = sample(WORLD, 3, generator=generators(3, 5, 7), **how)
    assert torch.equal(sample(WORLD, 2, generator=generators(7, 3), **how), three[[2, 0]])
    one, two, other = (sample(WORLD, 3, generator=torch.Generator().manual_seed(s), **how) for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_generators_draw_what_diffusers_draws():
    """The start noise is that of diffusers' pipelines, for one generator and for one a sample, in each type."""
    from diffusers.utils.torch_utils import randn_tensor

    for kind in (torch.float16, torch.float32, torch.float64):
        model = NetworkDenoiser(Still().to(kind), TrigFlow(), V(), (2, 3))
        for make in (lambda: torch.Generator().manual_seed(4), lambda: generators(4, 5)):
            theirs = randn_tensor((2, 2, 3), generator=make(), dtype=kind)
            assert torch.equal(sample(model, 2, generator=make()), sample(model, 2, noise=theirs))


class Still(nn.Module):
    """A network that gives back its input, in its own type only."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond=None):
        assert x.dtype == self.weight.dtype
        return x * self.weight


@pytest.mark.parametrize("how", [{"seeds": [3, 5, 7]}, {"generator": generators(3, 5, 7)}], ids=["seeds", "generators"])
def test_students(how):
    """A student that re-noises: the same rule, the noise of its later calls included."""
    student = Student(Jump(WORLD), {3: Plan((80.0, 5.0, 0.5), gamma=1.0)})
    three = student.sample(3, **how)
    last = {"seeds": [7]} if "seeds" in how else {"generator": generators(7)}
    assert torch.equal(student.sample(1, **last), three[2:])
    assert torch.equal(student.sample(1, seed=7), student.sample(1, seeds=[7]))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_samples_have_the_type_of_the_weights(kind):
    """Of denoisers and of students alike, and half precision starts from the noise of float32."""
    denoiser = NetworkDenoiser(Still().to(kind), TrigFlow(), V(), (4,))
    student = Student(Jump(denoiser), {1: Plan((TrigFlow().t_max,))})
    assert sample(denoiser, 2).dtype == student.sample(2).dtype == kind
    drawn = Rng(0, "sample").normal(2, 4, dtype=torch.promote_types(kind, torch.float32))
    assert torch.equal(student.sample(2), student(drawn.to(kind)))


def test_students_check_what_denoisers_check():
    """How many, which labels; dropout is off while a student samples, and on again afterwards."""
    net = MLP((4,), width=8, blocks=1, classes=3)
    net.add_module("dropout", nn.Dropout())
    student = Student(Jump(NetworkDenoiser(net, TrigFlow(), V(), (4,), classes=3)), {1: Plan((TrigFlow().t_max,))})
    for sampler in (student.sample, lambda *a, **k: sample(student.flow_map.denoiser, *a, **k)):
        with pytest.raises(ValueError, match="n=0 must be at least 1"):
            sampler(0)
        with pytest.raises(TypeError, match=r"n=2\.5 must be a whole number"):
            sampler(2.5)
        with pytest.raises(ValueError, match=r"labels must lie in 0 \.\. 2"):
            sampler(2, cond=torch.tensor([0, 3]))
        with pytest.raises(ValueError, match="cond holds 3 conditions for 2 samples"):
            sampler(2, cond=[0, 1, 2])
        with pytest.raises(ValueError, match="seeds holds 2 for 3 samples"):
            sampler(3, seeds=[1, 2])
    seen = []
    net.dropout.forward = lambda x: x
    net.register_forward_hook(lambda module, given, out: seen.append(module.dropout.training))
    student.train().sample(2, cond=[0, 1])
    assert seen == [False] and net.dropout.training


def test_one_source_a_sample():
    """A batch of another size is refused."""
    noise = PerSample([Rng(1), Rng(2)])
    assert torch.equal(noise.normal_like(torch.zeros(2, 3))[1:], Rng(2).normal(1, 3))
    with pytest.raises(ValueError, match="2 sources of noise for 3 samples"):
        noise.normal_like(torch.zeros(3, 3))
