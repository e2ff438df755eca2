"""LSD and LSD+: the closed form of the coefficients, fixed points, and what learning can and cannot mend."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fewstep.data import Dataset
from fewstep.denoisers import Denoiser
from fewstep.discrete.chains import Chain, Masked, Uniform
from fewstep.discrete.coupling import Draws, Moves
from fewstep.discrete.exact import (
    DataLaw,
    FactorizedLaw,
    JointLaw,
    index_of,
    sampler_law,
    sequences,
    total_variation,
)
from fewstep.discrete.learned import LearnedSampler
from fewstep.discrete.noise import Cosine, Geometric
from fewstep.discrete.samplers import Euler, Plan, Tweedie, step_laws
from fewstep.exact import Gaussian
from fewstep.hub.sampler_plans import load_plans, save_plans
from fewstep.methods.method import Batch, Progress
from fewstep.methods.samplers.lsd import (
    LSD,
    LSDPlus,
    SideBySide,
    StepSizes,
    best_phi,
    distance,
    least_squares,
    relaxed,
    teacher_interval,
)
from fewstep.methods.start import Start
from fewstep.randomness import Rng
from fewstep.schedules import EDM
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings, train

F64 = torch.float64


def correlated(chain: Chain) -> JointLaw:
    """Three tokens, mostly equal."""
    table = 0.05 * torch.rand((chain.tokens,) * 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    for i in range(chain.tokens):
        table[i, i, i] += 1
    return JointLaw(chain, table)


def independent(chain: Chain) -> FactorizedLaw:
    return FactorizedLaw(chain, torch.rand(4, chain.tokens, generator=torch.Generator().manual_seed(0), dtype=F64))


def batch(law: DataLaw, n: int, seed: int = 0) -> Batch:
    return Batch(torch.zeros(n, *law.shape, dtype=torch.long), None, Rng(seed, "batch"))


def error(law: JointLaw, plan: Plan) -> float:
    """The total variation of Euler by a plan from the data."""
    states, tokens = law.chain.states, law.chain.tokens
    made = sampler_law(law, plan, Euler()).reshape((states,) * 3)[:tokens, :tokens, :tokens]
    return total_variation(made.flatten(), law.law)


def test_gradient_descent_finds_the_closed_form() -> None:
    """On the states of one run, gradient descent on ``sum_k L_k`` ends at ``<A, B> / <B, B>`` to 1e-10, and no other
    value has a smaller loss."""
    law = correlated(Masked(3, Cosine()))
    run = SideBySide(law, Euler(), 4, 32, False, 64, 0.0, Rng(0), None)
    times = torch.tensor(run.grid.times, dtype=F64)
    triples = []
    for k in range(4):
        pair = run.compare(k, times[k], times[k + 1])
        triples.append((pair.teacher.summed, pair.jumps, pair.where))
        run.step(k, pair.jumps, 1.0)
    best = torch.stack([best_phi(*triple) for triple in triples])
    phi = torch.ones(4, dtype=F64, requires_grad=True)
    for _ in range(60):
        total = sum(distance(a, b, p, w) for (a, b, w), p in zip(triples, phi, strict=True))
        (slope,) = torch.autograd.grad(total, phi)
        curvature = torch.stack([distance(torch.zeros_like(b), b, torch.ones(()), w) for _, b, w in triples])
        phi.data -= 0.2 * slope / curvature
    assert float((phi.detach() - best).abs().max()) < 1e-10
    assert float((best - 1).abs().max()) > 0.05  # there was something to find
    for off in (-0.01, 0.01):
        for (a, b, w), p in zip(triples, best, strict=True):
            assert float(distance(a, b, p + off, w)) > float(distance(a, b, p, w))


@pytest.mark.parametrize("chain", [Masked(3), Masked(3, Geometric())], ids=repr)
def test_independent_tokens_need_no_coefficients(chain: Chain) -> None:
    """Where tokens are independent the score of a hidden one depends on the time alone: Phi* = 1 and the loss is 0,
    through the method too."""
    law = independent(chain)
    made = least_squares(law, 4, 16, 32)
    assert torch.allclose(torch.tensor(made.plans[4].phi), torch.ones(4), atol=1e-12)
    method = LSD(steps=4, teacher_steps=16, share=0.0)
    (update,) = method.updates(method.networks(Start(law)), batch(law, 32), Progress())
    assert float(update.loss.detach()) < 1e-28 and abs(float(update.logs["excess"])) < 1e-28


@pytest.mark.parametrize("chain", [Masked(3), Masked(3, Cosine()), Uniform(3)], ids=repr)
@pytest.mark.parametrize("target", ["interval", "accumulated"])
def test_as_many_steps_as_the_teacher_is_a_fixed_point(chain: Chain, target) -> None:
    """M = N, the same draws, no relaxation: student and teacher are the same run, the loss and its gradient are 0 at
    Phi = 1; so they are in the steps of LSD+."""
    law = correlated(chain)
    for method in (
        LSD(steps=6, teacher_steps=6, target=target, share=0.0),
        LSDPlus(steps=6, teacher_steps=6, target=target, share=0.0),
    ):
        nets = method.networks(Start(law))
        for update in method.updates(nets, batch(law, 64), Progress()):
            assert float(update.loss.detach()) < 1e-28
            update.loss.backward()
            assert all(float(p.grad.abs().max()) < 1e-14 for p in nets.group_parameters(update.group))


def test_other_draws_are_no_fixed_point() -> None:
    """The same with a relaxed start: the loss is not 0, so the test above can fail."""
    law = correlated(Masked(3))
    method = LSD(steps=6, teacher_steps=6, share=1.0)
    (update,) = method.updates(method.networks(Start(law)), batch(law, 64), Progress())
    assert float(update.loss.detach()) > 1e-3


@pytest.mark.parametrize("chain", [Masked(2, Cosine()), Uniform(2)], ids=repr)
def test_shared_draws_leave_the_law_of_the_teacher_alone(chain: Chain) -> None:
    """Moved through all intervals by shared draws, the teacher's samples have the law of its sampler (five standard
    errors of 20000)."""
    table = torch.tensor([[0.45, 0.05], [0.1, 0.4]], dtype=F64)
    law, n = JointLaw(chain, table), 20000
    rng = Rng(1)
    grid = Plan.uniform(chain, 2)
    x = chain.prior(n, 2, rng)
    for k in range(2):
        times = torch.linspace(grid.times[k], grid.times[k + 1], 4, dtype=F64)
        draws = Draws.fresh(rng, n, 2, chain.states)
        _, x = teacher_interval(law, Euler(), x, times, k == 1, draws, rng, None)
    expected = sampler_law(law, Plan.uniform(chain, 6), Euler())
    found = torch.bincount(index_of(x, chain.states), minlength=len(expected)).double() / n
    assert float(((found - expected).abs() - 5 * (expected * (1 - expected) / n).sqrt()).max()) <= 1e-15


def test_one_step_by_shared_draws_has_the_law_of_the_step() -> None:
    """``Moves`` is a categorical draw."""
    law, n = correlated(Uniform(3)), 20000
    x = torch.tensor([[0, 1, 1]]).expand(n, 3)
    rows = step_laws(law.chain, Euler(), law(x, 0.5), x, Plan((0.5, 0.3, 0.1)), 0)
    moved = Moves(Draws.fresh(Rng(0), n, 3, 3))(x, rows)
    found = torch.stack([torch.bincount(moved[:, i], minlength=3) for i in range(3)]).double() / n
    assert float(((found - rows[0]).abs() - 5 * (rows[0] * (1 - rows[0]) / n).sqrt()).max()) <= 0


def test_log_linear_masks_agree_at_the_shared_times() -> None:
    """With log-linear noise Euler shows a token at its level whatever the number of steps: teacher and student hide
    the same positions at every shared time."""
    law = correlated(Masked(3))
    run = SideBySide(law, Euler(), 4, 32, False, 256, 0.0, Rng(0), None)
    times = torch.tensor(run.grid.times, dtype=F64)
    for k in range(4):
        pair = run.compare(k, times[k], times[k + 1])
        assert torch.equal(law.chain.visible(pair.teacher.x), law.chain.visible(run.x))
        run.step(k, pair.jumps, 1.0)


@pytest.mark.parametrize("noise", [Cosine(), Geometric()], ids=repr)
def test_accumulated_targets_mend_the_discretisation(noise) -> None:
    """Independent tokens, Euler, noise that is not log-linear: the best coefficient is the teacher's probability of
    showing a token during the interval over the student's, ``sum_j e_j prod_{i<j} (1 - e_i) / e``; with a teacher of
    many steps that is the true probability."""
    law, fine = independent(Masked(3, noise)), 8

    def euler(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        keep = noise.keep(t)
        return (t - s) * noise.rate(t) * keep / (1 - keep)

    def best(t: float, s: float, n: int) -> float:
        times = torch.linspace(t, s, n + 1, dtype=F64)
        e = euler(times[:-1], times[1:])
        hidden = torch.cat([torch.ones(1, dtype=F64), (1 - e).clamp_min(0).cumprod(0)[:-1]])
        return float((e * hidden).sum() / euler(times[0], times[-1]))

    made = least_squares(law, 4, 4 * fine, 8192, target="accumulated").plans[4]
    expected = [best(t, s, fine) for t, s in pairwise(made.times)]
    off = (torch.tensor(made.phi) / torch.tensor(expected) - 1).abs()
    assert bool((off < torch.tensor([0.05, 0.05, 0.05, 0.15])).all())  # the noise of 8192 runs; few are hidden last
    for t, s in list(pairwise(made.times))[:-1]:  # the last step shows everything anyhow
        ends = torch.tensor([t, s], dtype=F64)
        true = (noise.keep(ends[1]) - noise.keep(ends[0])) / (1 - noise.keep(ends[0]))
        assert best(t, s, 4096) == pytest.approx(float(true / euler(*ends)), rel=2e-3)


@pytest.mark.parametrize(("noise", "gain"), [(Cosine(), 0.96), (Geometric(), 0.6)], ids=repr)
def test_learned_coefficients_beat_euler_where_it_is_wrong(noise, gain: float) -> None:
    """Correlated tokens, four Euler steps: with accumulated targets the exact error falls to at most this share (0.94
    and 0.53 measured), near to Tweedie's."""
    law = correlated(Masked(3, noise))
    plain = error(law, Plan.uniform(law.chain, 4))
    assert error(law, least_squares(law, 4, 64, 1024, target="accumulated").plans[4]) < gain * plain


def test_the_papers_target_does_not_suit_chains_without_a_mask() -> None:
    """On a uniform chain the student's wrong tokens, which have to jump, meet a teacher that has none: coefficients
    shrink to almost nothing and the exact error is several times Euler's.  A teacher that restarts from the student's
    state does no such harm."""
    law = correlated(Uniform(3))
    plain = error(law, Plan.uniform(law.chain, 8))
    papers = least_squares(law, 8, 64, 512).plans[8]
    mended = least_squares(law, 8, 64, 512, target="accumulated", restart=True).plans[8]
    assert papers.phi[-1] < 0.3 and error(law, papers) > 3 * plain
    assert mended.phi[-1] > 0.9 and error(law, mended) < 1.3 * plain


def test_the_trainer_comes_to_the_least_squares() -> None:
    """LSD by gradient descent, fresh runs every iteration, ends where least squares over many samples ends."""
    law = correlated(Masked(3, Cosine()))
    method = LSD(steps=3, teacher_steps=6, target="accumulated", share=0.0, lr=0.08)
    data = Dataset("nothing", torch.zeros(8, 3, dtype=torch.long))
    made = train(method, Start(law, data), Settings(Budget(60), batch=128, precision="fp32"), show=False)
    assert isinstance(made.model, LearnedSampler)
    reference = least_squares(law, 3, 6, 16384, target="accumulated").plans[3]
    assert torch.allclose(torch.tensor(made.model.plans[3].phi), torch.tensor(reference.phi), atol=0.03)
    assert made.records[-1]["coefficients/excess"] < 0.1 * made.records[0]["coefficients/excess"]


def test_step_sizes_are_a_partition() -> None:
    """Whatever the logits, times fall strictly from t_max to t_min; equal steps at the start."""
    chain = Masked(3)
    sizes = StepSizes(chain, 5)
    assert torch.allclose(sizes.times(), torch.tensor(Plan.uniform(chain, 5).times, dtype=F64), atol=1e-15)
    sizes.logits.data = torch.tensor([3.0, -8.0, 0.0, 5.0, -2.0], dtype=F64)
    times = sizes.times().detach()
    assert bool((times.diff() < 0).all()) and float(times[0]) == 1.0 and float(times[-1]) == chain.t_min


def test_the_literal_target_is_the_teachers_step() -> None:
    """As printed, the target of LSD+ is M / N of the student's own scale, and its loss is least at jumps that short."""
    law = independent(Masked(3))
    run = SideBySide(law, Euler(), 4, 32, False, 64, 0.0, Rng(0), None)
    times = torch.tensor(run.grid.times, dtype=F64)
    pair = run.compare(1, times[1], times[2])
    assert torch.allclose(pair.teacher.target("literal", 8), pair.teacher.target("interval", 8) / 8, atol=1e-16)
    run = SideBySide(law, Euler(), 4, 32, False, 64, 0.0, Rng(0), None)
    pair = run.compare(0, times[0], times[1])
    assert float(best_phi(pair.teacher.target("literal", 8), pair.jumps, pair.where)) == pytest.approx(1 / 8)


def test_the_literal_target_would_pull_every_step_down() -> None:
    """Its gradient with free steps is positive everywhere: all of them would shrink.  On the simplex they cannot."""
    law = independent(Masked(3))
    method = LSDPlus(steps=4, teacher_steps=32, share=0.0, step_target="literal")
    run = SideBySide(law, Euler(), 4, 32, False, 64, 0.0, Rng(0), None)
    for k in range(4):
        t, size = torch.tensor(run.grid.times[k], dtype=F64), torch.tensor(0.25, dtype=F64, requires_grad=True)
        pair = run.compare(k, t, t - size)
        distance(pair.teacher.target("literal", 8), pair.jumps, torch.ones((), dtype=F64), pair.where).backward()
        assert float(size.grad) > 0
        run.step(k, pair.jumps.detach(), 1.0)
    nets = method.networks(Start(law))
    _, update = method.updates(nets, batch(law, 64), Progress())
    update.loss.backward()
    assert float(nets.sizes.logits.grad.sum()) == pytest.approx(0, abs=1e-12)


def test_steps_are_differentiated_through_the_times() -> None:
    """The gradient of LSD+'s steps is that of the loss by central differences, the states of the run held: through
    the step's length, through the rate and through the score."""
    law = correlated(Masked(3, Cosine()))
    method = LSDPlus(steps=3, teacher_steps=12, share=0.0)
    nets = method.networks(Start(law))
    nets.sizes.logits.data = torch.tensor([0.3, -0.2, 0.1], dtype=F64)
    states: list[torch.Tensor] = []

    def loss(logits: torch.Tensor) -> float:
        nets.sizes.logits.data = logits
        times, total = nets.sizes.times(), 0.0
        for k, (x, pair) in enumerate(zip(states, pairs, strict=True)):
            jumps = Euler().jumps(law.chain, law(x, times[k]), x, times[k], times[k + 1])
            total += float(distance(pair.teacher.summed, jumps, torch.ones((), dtype=F64), pair.where))
        return total

    run = SideBySide(law, Euler(), 3, 12, False, 128, 0.0, Rng(0, "batch"), None)
    times, pairs = nets.sizes.times(), []
    for k in range(3):
        states.append(run.x)
        pairs.append(run.compare(k, times[k], times[k + 1]))
        run.step(k, pairs[-1].jumps.detach(), 1.0)
    _, update = method.updates(nets, batch(law, 128), Progress())
    update.loss.backward()
    found, start = nets.sizes.logits.grad.clone(), nets.sizes.logits.detach().clone()
    for i in range(3):
        off = 1e-5 * torch.nn.functional.one_hot(torch.tensor(i), 3)
        slope = (loss(start + off) - loss(start - off)) / 2e-5
        assert float(found[i]) == pytest.approx(slope, rel=1e-6)
    assert float(found.abs().max()) > 1e-3


def test_the_record_of_steps_says_how_long_they_are() -> None:
    """``least`` and ``most`` are the lengths of the shortest and the longest step, positive, whatever the times."""
    law = independent(Masked(3))
    method = LSDPlus(steps=4, teacher_steps=8, share=0.0)
    nets = method.networks(Start(law))
    nets.sizes.logits.data = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=F64).log()  # a partition by tenths
    _, update = method.updates(nets, batch(law, 8), Progress())
    span = law.chain.t_max - law.chain.t_min
    assert float(update.logs["least"]) == pytest.approx(0.1 * span, rel=1e-12)
    assert float(update.logs["most"]) == pytest.approx(0.4 * span, rel=1e-12)


def test_the_record_of_coefficients_has_both_ends() -> None:
    """``phi_least`` and ``phi_most`` of the coefficients as they are."""
    law = independent(Masked(3))
    method = LSD(steps=4, teacher_steps=8, share=0.0)
    nets = method.networks(Start(law))
    nets.coefficients.phi.data = torch.tensor([0.7, 1.3, 0.4, 1.1], dtype=F64)
    (update,) = method.updates(nets, batch(law, 8), Progress())
    assert (float(update.logs["phi_least"]), float(update.logs["phi_most"])) == (0.4, 1.3)


def test_lsd_plus_improves_a_bad_chain_of_steps() -> None:
    """Four Euler steps under geometric noise: learned coefficients and times together beat plain Euler."""
    law = correlated(Masked(3, Geometric()))
    method = LSDPlus(steps=4, teacher_steps=16, share=0.0, target="accumulated", lr=0.1)
    data = Dataset("nothing", torch.zeros(8, 3, dtype=torch.long))
    made = train(method, Start(law, data), Settings(Budget(40), batch=64, precision="fp32"), show=False).model
    plan = made.plans[4]
    assert plan.times != Plan.uniform(law.chain, 4).times
    assert error(law, plan) < 0.85 * error(law, Plan.uniform(law.chain, 4))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_relaxed_starts_stay_within_their_distance(share: float) -> None:
    """At most ``floor(share L)`` positions differ, some samples use all of it, some none."""
    chain = Masked(5)
    x = chain.prior(400, 40, Rng(0))
    changed = (relaxed(chain, x, share, Rng(1)) != x).sum(1)
    assert int(changed.max()) == math.floor(share * 40 + 1e-9) and int(changed.min()) == 0


def test_relaxed_positions_take_any_token() -> None:
    """Of positions that may all change half do on average, to each of five tokens alike; 5 standard deviations."""
    chain = Masked(5)
    found = relaxed(chain, chain.prior(20_000, 1, Rng(0)), 1.0, Rng(1))
    shares = torch.bincount(found.flatten(), minlength=6) / 20_000
    expected = torch.tensor([0.1] * 5 + [0.5])
    assert bool(((shares - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all())


def test_plans_are_files_that_belong_to_a_model(tmp_path: Path) -> None:
    """A plan read back is the plan; on another model, another chain or a damaged file it is refused in one line."""
    law = correlated(Masked(3, Cosine()))
    made = least_squares(law, 4, 16, 64)
    path = save_plans(made, tmp_path / "plan.json")
    again = load_plans(path, law)
    assert again.plans == made.plans and again.stepper == "euler"
    other = correlated(Masked(3, Cosine()))
    other.law[0] += 1e-9
    with pytest.raises(ValueError, match="learned for another model: weights"):
        load_plans(path, other)
    with pytest.raises(ValueError, match="learned for another model: chain Masked"):
        load_plans(path, correlated(Masked(3)))
    content = json.loads(path.read_text())
    for broken, message in (
        ("{", "not valid JSON"),
        ("[]", r"\[\] must be an object"),
        (json.dumps(content | {"format": 9}), "format = 9 must be 1"),
        (json.dumps(content | {"plans": {"4": {"times": [1.0]}}}), r"'plans\.4\.phi' is missing"),
        (json.dumps(content | {"plans": {"4": {"times": [1.0, 2.0], "phi": [1.0]}}}), "strictly decreasing"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            load_plans(path, law)
    with pytest.raises(FileNotFoundError):
        load_plans(tmp_path / "none.json", law)


def test_the_run_is_the_same_in_parts() -> None:
    """Draws are those of the global batch: the losses of two halves average to that of the whole."""
    law = correlated(Masked(3, Cosine()))
    method = LSD(steps=4, teacher_steps=16)
    nets = method.networks(Start(law))

    def loss(n: int, part: int, parts: int) -> float:
        rng = Rng(0, "batch", part=part, parts=parts)
        found = Batch(torch.zeros(n, 3, dtype=torch.long), None, rng)
        (update,) = method.updates(nets, found, Progress())
        return float(update.loss.detach())

    assert (loss(16, 0, 2) + loss(16, 1, 2)) / 2 == pytest.approx(loss(32, 0, 1), rel=1e-12)


def test_tweedie_has_coefficients_too() -> None:
    """With Tweedie as stepper and independent tokens there is nothing to learn in any noise, from either target."""
    law = independent(Masked(3, Geometric()))
    made = least_squares(law, 4, 16, 64, stepper="tweedie")
    assert torch.allclose(torch.tensor(made.plans[4].phi), torch.ones(4), atol=1e-12)
    summed = least_squares(law, 2, 64, 4096, stepper="tweedie", target="accumulated")
    assert torch.allclose(torch.tensor(summed.plans[2].phi), torch.ones(2), atol=0.05)
    assert isinstance(sampler_law(law, made.plans[4], Tweedie()), torch.Tensor)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSD(steps=8, teacher_steps=20), "teacher_steps=20 must be a multiple of steps=8"),
        (lambda: LSD(steps=8, teacher_steps=4), "teacher_steps=4 must be a multiple"),
        (lambda: LSD(share=1.5), "share=1.5 must lie in"),
        (lambda: LSD().networks(Start(_continuous())), "the teacher is a Gaussian"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    """One line that names the field and the value."""
    with pytest.raises(ValueError, match=message):
        make()


def _continuous() -> Denoiser:
    return Gaussian(EDM(), torch.zeros(2, dtype=F64), 1.0)


def test_every_sequence_is_reachable() -> None:
    """The enumeration that the exact laws rest on has every sequence once."""
    every = sequences(3, 3)
    assert len({tuple(row) for row in every.tolist()}) == 27 and index_of(every, 3).tolist() == list(range(27))
