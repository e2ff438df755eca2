"""DisBack: the recorded path, the target of the moment, and what a host sees of them."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.cli import main, methods
from fewstep.data import Dataset
from fewstep.denoisers import Denoiser, NetworkDenoiser
from fewstep.exact import ring
from fewstep.guidance import Guided
from fewstep.methods.consistency.cm import ConsistencyDistillation
from fewstep.methods.matching import disback
from fewstep.methods.matching.diff_instruct import DiffInstruct
from fewstep.methods.matching.disback import Backtracking, DegradationRecording, DisBack, Host
from fewstep.methods.matching.dmd import DMD
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.matching.sid import SiD
from fewstep.methods.matching.sim import SIM
from fewstep.methods.method import Batch, Method, Progress, alone
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.metrics import energy_distance
from fewstep.networks import MLP
from fewstep.predictions import X0, TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.course import run_recipe
from fewstep.runs.record import hyper_parameters
from fewstep.schedules import FlowMatching, TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.settings import Settings
from fewstep.training.trainer import Result, Run, train

#: SYZhang0805/DisBack, experiments/sdxl: DMD2 in one step; iterations 24000 to 25000 with a checkpoint each 100; 1000
#: iterations for each node of the 100 thousand of the second stage.
PUBLISHED: dict[str, Any] = {
    "host": Host(DMD2()), "nodes": 10, "recording": 1000 / 101_000, "backtracking": 10 * 1000 / 100_000,
    "optimizer": dict.fromkeys(("kind", "betas", "eps", "weight_decay", "clip", "warmup", "decay"), ...),
}  # fmt: skip
F64 = torch.float64
HOSTS = [DMD2(gan_weight=0.1), DMD(pairs=16, ode_steps=2), DiffInstruct(), SiD(), SIM()]


def teacher_network(kind: torch.dtype = torch.float32) -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = MLP((3,), 16, 1, 2)
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return NetworkDenoiser(net.to(kind), TrigFlow(sigma_data=0.7), TrigPrediction(sigma_data=0.7), (3,), 2)


def points(kind: torch.dtype = torch.float32) -> Dataset:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(1), dtype=kind)
    return Dataset("points", x, torch.arange(32) % 2)


def run(method: Method, start: Start, steps: int, batch: int = 8, seed: int = 0) -> Result:
    return train(method, start, Settings(Budget(steps), batch, seed=seed, precision="fp32", log_steps=1), show=False)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# --- the host and its word -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_without_nodes_it_is_the_host(host: Method) -> None:
    """The same weights, bit for bit, as a recipe without nodes and as a second stage without a first; with nodes they
    are others."""
    settings = Settings(Budget(3), 8, precision="fp32")
    expected = weights(run_recipe(host, teacher_network(), points(), settings, show=False).model)
    for recipe in (DisBack(host, nodes=0), Backtracking(host)):  # type: ignore[arg-type]
        made = run_recipe(recipe, teacher_network(), points(), settings, show=False).model
        assert torch.equal(weights(made), expected)
    with_nodes = DisBack(host, nodes=2, recording=0.5)  # type: ignore[arg-type]
    longer = dataclasses.replace(settings, budget=Budget(6))
    assert not torch.equal(
        weights(run_recipe(with_nodes, teacher_network(), points(), longer, show=False).model), expected
    )


def test_a_host_is_written_as_its_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A word, a method and a recipe file are the same host; what is wrong with a word is said in one line."""
    host = Host.parse("dmd2:gan-weight=0,lr=1e-4,steps=4")
    assert host.method == DMD2(gan_weight=0.0, lr=1e-4, steps=4)
    assert Host.parse(str(host)) == host and str(Host(SiD())) == "sid"
    third = Host(DMD2(lr=1 / 3))
    assert Host.parse(str(third)) == third
    assert Host.parse("cm:steps=1,2,lr=1e-3").method == ConsistencyDistillation(steps=(1, 2), lr=1e-3)
    recipe = DisBack(host=host, nodes=3)
    assert DisBack(host=host.method, nodes=3) == recipe  # type: ignore[arg-type]
    assert methods.build("disback", json.loads(json.dumps(hyper_parameters(recipe)))) == recipe
    for word, said in (
        ("dmd3", "'dmd3' is no method; did you mean 'dmd"), ("dmd2:gan=1", "dmd2 has no 'gan'"),
        ("dmd2:lr=x", "dmd2: lr: 'x' is not a finite number"), ("dmd2:lr=-1", "DMD2: lr=-1 must be at least 0"),
        ("dmd2:lr", "dmd2 'lr' has no value"), ("pd", "is not a Method"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Host.parse(word)
    with pytest.raises(ValueError, match="host cm: it trains student, not a student beside a critic"):
        DegradationRecording(Host(ConsistencyDistillation())).networks(Start(teacher_network()))
    place, flags = str(tmp_path / "run"), ["--teacher", "digits", "--budget", "2steps", "--batch", "4", "--quiet"]
    main(["distill", "disback", *flags, "--host", "diff-instruct:lr=2e-4", "--nodes", "1", "--out", place])
    main(["distill", "--recipe", f"{place}/recipe.json", "--out", f"{place}-again", "--quiet"])
    first, again = (json.loads(Path(f"{p}/recipe.json").read_text()) for p in (place, f"{place}-again"))
    assert first["hyper_parameters"] == again["hyper_parameters"]
    assert first["hyper_parameters"]["host"] == "diff-instruct:lr=0.0002"


# --- recording -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_the_recording_is_the_hosts_critic_on_a_held_student(host: Method) -> None:
    """One update, the critic's, in whatever iteration; where the host's critic draws first, or alone, its gradient is
    the host's bit for bit, that of a discriminator's head included."""
    start = Start(teacher_network(), points())

    def critic(method: Method) -> tuple[int, list[Tensor]]:
        torch.manual_seed(2)  # the head's weights
        nets, rows, rng = method.networks(start), start.data.rows(slice(0, 8)), Rng(1)
        pairs = Batch(rows.x, rows.cond, rng, {"noise": rng.normal(8, 3)})
        batch = Batch(rows.x, rows.cond, Rng(0), of={"pairs": pairs})
        updates = list(alone(method.updates(nets, batch, Progress(step=1))))
        held = [p for p in nets.parameters() if p.requires_grad]
        loss = next(update.loss for update in updates if update.group == "critic")
        slopes = torch.autograd.grad(loss, held, allow_unused=True)
        return len(updates), [slope for slope in slopes if slope is not None]

    (one, found), (several, expected) = critic(DegradationRecording(Host(host))), critic(host)
    assert one == 1 and several == (1 if host.name == "dmd2" else 2)
    assert any(float(slope.abs().max()) > 0 for slope in found)
    assert host.name == "dmd" or all(map(torch.equal, found, expected))
    nets = DegradationRecording(Host(host)).networks(start)
    assert list(nets.groups) == ["critic"] and not any(p.requires_grad for p in nets.student.parameters())


def test_nodes_are_the_critic_at_equal_intervals() -> None:
    """Node k of M is the critic after k / M of the iterations, the last one its end; what was not due in a run that
    took few iterations is its end too."""
    start, host = Start(teacher_network(), points()), Host(DiffInstruct())
    made = run(DegradationRecording(host, nodes=4), start, 12).made
    shorter = [run(DegradationRecording(host, nodes=1), start, steps).made["critic"] for steps in (3, 6, 9, 12)]
    for found, expected in zip([*made["path"], made["critic"]], shorter, strict=True):  # type: ignore[misc]
        assert torch.equal(weights(found), weights(expected))
    assert len({float(weights(node).sum()) for node in shorter}) == 4
    few = run(DegradationRecording(host, nodes=5), start, 2).made
    assert [torch.equal(weights(node), weights(few["critic"])) for node in few["path"]] == [False, False, True, True]  # type: ignore[union-attr]


class Normal(nn.Module):
    """The denoiser of N(mean, sd^2) on flow matching, both learned."""

    def __init__(self, mean: float, sd: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=F64))
        self.log_sd = nn.Parameter(torch.tensor(sd, dtype=F64).log())

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        time, v = t[:, None], (2 * self.log_sd).exp()
        alpha, sigma = 1 - time, time
        return self.mean + alpha * v / (alpha**2 * v + sigma**2) * (x - alpha * self.mean)


class Linear(nn.Module):
    """A generator of N(b, a^2): ``b + a x`` of the noise."""

    def __init__(self, b: float, a: float) -> None:
        super().__init__()
        self.b, self.a = (nn.Parameter(torch.tensor(v, dtype=F64)) for v in (b, a))

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return self.b + self.a * x


def normal_start(b: float = -1.0, a: float = 1.5) -> Start:
    """A teacher of N(1, 0.5^2), a student that begins as N(b, a^2), and no data but their shape."""
    seen = {"student": Linear(b, 2 * a), "critic": Normal(1.0, 0.5), "teacher": Normal(1.0, 0.5)}
    schedule = FlowMatching(t_min=1e-3, t_max=1.0)
    models = {role: NetworkDenoiser(net, schedule, X0(), (1,)) for role, net in seen.items()}
    teacher = models.pop("teacher")
    return Start(teacher, Dataset("zeros", torch.zeros(512, 1, dtype=F64)), given=models)


HOST = DiffInstruct(critic_lr=0.03, lr=0.01)  # which calls its student at sigma = 0.5


def moments(nodes: list[Any]) -> tuple[Tensor, Tensor]:
    """The means and the standard deviations of denoisers of normal laws."""
    return tuple(torch.stack([get(node.net).detach() for node in nodes]) for get in (  # type: ignore[return-value]
        lambda net: net.mean, lambda net: net.log_sd.exp()))  # fmt: skip


@pytest.fixture(scope="module")
def recorded() -> Result:
    """A first stage between two normal laws."""
    return run(DegradationRecording(Host(HOST), nodes=5), normal_start(), 100, 512)


def path_of(made: Result) -> list[Any]:
    """All recorded denoisers, from the teacher to the critic."""
    return [normal_start().teacher, *made.made["path"], made.made["critic"]]  # type: ignore[misc]


def test_moments_move_monotonically_along_the_path(recorded: Result) -> None:
    """From the teacher's N(1, 0.5^2) towards the student's N(-1, 1.5^2), mean and deviation in every interval, and more
    of the way is done the longer the recording takes."""
    mean, sd = moments(path_of(recorded))
    assert bool((mean.diff() < 0).all()) and bool((sd.diff() > 0).all())
    assert float(mean[-1]) < -0.2 and float(sd[-1]) == pytest.approx(1.5, abs=0.1)
    short, _ = moments(path_of(run(DegradationRecording(Host(HOST), nodes=5), normal_start(), 20, 512)))
    assert bool((short[1:] > mean[1:]).all())


# --- backtracking ----------------------------------------------------------------------------------------------------


def test_the_critic_starts_as_the_last_node_and_the_head_goes_on() -> None:
    """What the first stage handed on, by role and strictly: critic and head bit for bit, and not the teacher's."""
    host = Host(DMD2(gan_weight=0.1))
    start = Start(teacher_network(), points())
    made = run(DegradationRecording(host, nodes=3), start, 4).made
    begin = dataclasses.replace(start, made=made)
    nets = Backtracking(host).networks(begin)
    assert torch.equal(weights(nets.critic), weights(made["critic"]))
    assert not torch.equal(weights(nets.critic), weights(start.teacher))
    assert torch.equal(weights(nets.discriminator), weights(made["discriminator"]))
    assert torch.equal(weights(nets.student), weights(start.teacher))
    nets.critic.net.leave.bias.data += 1  # what trains is no longer the node
    assert torch.equal(weights(made["critic"]), weights(Backtracking(host).networks(begin).critic))
    wrong = dataclasses.replace(begin, made={**made, "discriminator": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match="Missing key"):
        Backtracking(host).networks(wrong)


def test_the_target_walks_back_to_the_teacher() -> None:
    """Equal shares for the nodes M - 1 to 1, in reverse, then the teacher; a function of the budget used alone."""
    method = Backtracking(backtracking=0.4)
    grid = [k / 20 for k in range(20)]
    assert [method.node(5, f) for f in grid] == [4, 4, 3, 3, 2, 2, 1, 1] + [0] * 12
    assert {Backtracking(backtracking=0.0).node(5, f) for f in grid} == {0} == {method.node(1, f) for f in grid}
    start = Start(teacher_network(), points())
    host = Host(DMD2(gan_weight=0.0, critic_steps=1))
    nets = method.networks(dataclasses.replace(start, made=run(DegradationRecording(host, nodes=3), start, 6).made))
    seen = []
    for fraction in (0.0, 0.25, 0.9, 0.1):  # whatever came before
        rows = start.data.rows(slice(0, 4))
        batch = Batch(rows.x, rows.cond, Rng(0))
        list(alone(dataclasses.replace(method, host=host).updates(nets, batch, Progress(fraction=fraction))))
        seen.append(nets.path.at)
    assert seen == [2, 1, 0, 2]


def test_whoever_looks_sees_the_node_of_the_moment() -> None:
    """Data prediction, its affine form, features and "no condition", under guidance and on another schedule."""
    nodes = [teacher_network(F64) for _ in range(2)]
    nodes[1].net.leave.bias.data += 0.3
    nodes[1].net.enter.bias.data += 0.3
    path = disback.RecordedPath(nodes)
    x, t, cond = torch.randn(4, 3, dtype=F64), torch.full((4,), 0.7, dtype=F64), torch.arange(4) % 2
    flow = FlowMatching()
    for at, node in enumerate(nodes):
        path.at = at
        assert torch.equal(path(x, t, cond), node(x, t, cond))
        assert all(map(torch.equal, path.affine(x, t, cond), node.affine(x, t, cond)))
        assert torch.equal(path.features(x, t, cond), node.features(x, t, cond))
        assert torch.equal(Guided(path, 2.0)(x, t, cond), Guided(node, 2.0)(x, t, cond))
        torch.testing.assert_close(path.on(flow)(x, 0.6, cond), node.on(flow)(x, 0.6, cond), atol=1e-12, rtol=0)
        assert torch.equal(path.label(t, x), node.label(t, x)) and path.feature_shape == node.feature_shape
        assert torch.equal(path.null, torch.tensor([-1]))  # type: ignore[arg-type]
    assert path.native() is path and path.schedule == nodes[0].schedule and path.classes == 2
    path.at = 0
    assert not torch.equal(path(x, t, cond), nodes[1](x, t, cond))


def gap(one: Denoiser, other: Denoiser, x: Tensor) -> float:
    """``E |D_one - D_other|^2`` at noised samples, its root."""
    t = torch.linspace(0.05, 0.95, len(x), dtype=F64)
    x_t = one.schedule.add_noise(x, Rng(3).normal_like(x), t)
    with torch.no_grad():
        return float((one(x_t, t) - other(x_t, t)).square().mean().sqrt())


def test_the_first_target_is_near_the_critic(recorded: Result) -> None:
    """On the initial student's samples the mismatch grows from node to node, and that with the first target is a small
    part of that with the teacher."""
    *targets, critic = path_of(recorded)
    x = -1 + 1.5 * Rng(2).normal(4096, 1, dtype=F64)
    gaps = [gap(critic, node, x) for node in targets]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.15 * gaps[0]


def test_the_mismatch_stays_small_on_the_way(recorded: Result) -> None:
    """As it is logged: the host alone meets a gap that is more than twice what the targets on the way ever show; at the
    teacher, the last switch, it is no larger than the host's."""
    start = normal_start()
    after = dataclasses.replace(start, made=recorded.made)
    host, walked = (
        [r["student/score_gap"] for r in run(method, begin, 100, 512).records]
        for method, begin in ((HOST, start), (Backtracking(Host(HOST), backtracking=0.8), after))
    )
    assert max(host) > 2 * max(walked[:60]) and max(walked) < 1.1 * max(host)


# --- what it is for --------------------------------------------------------------------------------------------------


def test_a_student_from_far_away_arrives_in_fewer_updates() -> None:
    """On a ring, from three standard deviations aside, with a small teacher that was learned: the distance over 140
    updates of the student is lower with a path of three nodes, and half as large at their end (seen on three seeds:
    0.67 to 0.78, and 0.2 to 0.4)."""
    world = ring(TrigFlow(sigma_data=1.4))
    x, held_out = (world.sample(n, Rng(seed)).float() for n, seed in ((4096, 1), (512, 9)))
    torch.manual_seed(0)
    net = NetworkDenoiser(MLP((2,), 32, 1), world.schedule, TrigPrediction(sigma_data=1.4), (2,))
    data = Dataset("ring", x)
    settings = Settings(Budget(300), 256, precision="fp32", averages=())
    teacher = train(Denoising(lr=4e-3, warmup=20), Start(net, data), settings, show=False).model
    far = copy.deepcopy(teacher)
    with torch.no_grad():
        far.net.leave.bias[0] -= 3 * x[:, 0].std() / 1.4  # type: ignore[union-attr, operator]
    start = Start(teacher, data, given={"student": far})  # type: ignore[arg-type]
    host = Host(DMD2(gan_weight=0.0, critic_steps=1, lr=2e-3, critic_lr=4e-3))

    def distances(method: Method, begin: Start) -> list[float]:
        here = dataclasses.replace(settings, budget=Budget(140), batch=128)
        trained, found = Run(method, method.networks(begin), here, Parallel()), []
        for step in range(140):
            trained.step(data)
            if step % 10 == 9:
                with torch.no_grad():
                    found.append(energy_distance(method.student(trained.nets)(Rng(2).normal(512, 2)), held_out))
        return found

    recording = dataclasses.replace(settings, budget=Budget(15), batch=128, seed=100)
    made = train(DegradationRecording(host, 3), start, recording, show=False).made
    plain = distances(host.method, start)
    walked = distances(Backtracking(host, 0.15), dataclasses.replace(start, made=made))
    assert sum(walked) < 0.9 * sum(plain)
    assert sum(walked[-4:]) < 0.6 * sum(plain[-4:])
