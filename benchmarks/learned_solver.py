"""A learned solver beside the best hand-made one and the published ways to learn less of it.

    python benchmarks/learned_solver.py digits --picture docs/img/learned-solver.png
    python benchmarks/learned_solver.py digits --guidance 3
    python benchmarks/learned_solver.py fashion --calls 4 6 8 10 --ours --train 64 --test 96
    python benchmarks/learned_solver.py digits --points 8 16 32 64 128 256        how many starting points it takes
    python benchmarks/learned_solver.py digits --transfer                         to other guidance and classes

The error is the root mean square distance of a sample from where 80 calls take the same noise, averaged; fresh noise
that nothing was chosen on.  All that is learned starts from the same hand-made solver and the same starting points.
Seconds are those of the processor (one thread), without the reference.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import api
from fewstep.denoisers import Denoiser, gradients
from fewstep.sampling import DDIM, LearnedSolver, Levels, Solver, balanced, folded, solve
from fewstep.sampling.learning import Iterate, Task, learning, moved, normal_equations
from fewstep.sampling.search import Reference, measured, noise_for
from fewstep.sampling.solvers.abm import ABM
from fewstep.schedules import Schedule

CENTRES, KAPPAS, ORDERS = (0.5, 1.0, 1.5, 2.0), (1.0, 1.2, 1.5, 1.8, 2.0), (1, 2, 3)
OTHERS = ("unipc", "dpmpp-2m", "dualfast", "deis-2", "ipndm")

Made = Callable[[Tensor], LearnedSolver]


def reference(model: Denoiser, n: int, seed: int, guidance: float | None, cond: Tensor | None = None) -> Reference:
    """Starting points and where 80 calls of the solver of third order take them."""
    noise = noise_for(model, n, seed)
    cond = torch.arange(n) % 10 if cond is None else cond
    task = Task.of(model, Reference(noise, noise, cond, guidance), None)
    times = balanced(model.schedule, 80, 1.0)
    with torch.no_grad():
        ends = [
            solve(part.denoiser, part.start, times, ABM(p=3, c=1.0), part.cond)
            for part in (task.part(k, 64) for k in range(0, n, 64))
        ]
    return Reference(noise, torch.cat(ends), cond, guidance)


def error(model: Denoiser, solver: LearnedSolver, target: Reference) -> tuple[float, float]:
    return measured(model, {"solver": solver}, target)


def written(schedule: Schedule, solver: Solver, times: Tensor) -> LearnedSolver:
    return folded(solver.table(Levels.of(schedule, times)))


def hand_made(model: Denoiser, calls: int, target: Reference) -> tuple[str, Solver, LearnedSolver]:
    """The best of 120 settings of ABM, each on its balanced grid."""
    schedule, found = model.schedule, []
    few = target.part(0, max(12, len(target.noise) // 8))
    for c, kappa, p, corrector in product(CENTRES, KAPPAS, ORDERS, (True, False)):
        solver = ABM(p=p, c=c, corrector=corrector)
        rows = written(schedule, solver, balanced(schedule, calls, c, kappa))
        name = f"ABM-{p}, c = {c:g}, kappa = {kappa:g}" + ("" if corrector else ", no corrector")
        found.append((error(model, rows, few)[0], name, solver, rows))
    found.sort(key=lambda row: row[0])
    return min(found[:6], key=lambda row: error(model, row[3], target)[0])[1:]


# what is learned


def numbers(solver: LearnedSolver, schedule: Schedule) -> Tensor:
    """The numbers of a solver in the order of ``moved``: logarithms of noise levels, and rows."""
    found: list[float] = []
    for i, (t, row) in enumerate(zip(solver.times, solver.rows, strict=True)):
        found += [*([-float(schedule.log_snr(torch.tensor(t, dtype=torch.float64)))] if i else []), *row]
    return torch.tensor(found, dtype=torch.float64)


def reduced(task: Task, held_out: Task, made: Made, theta: Tensor, iterations: int = 8) -> LearnedSolver:
    """Gauss-Newton in fewer parameters: ``made(theta)`` is the solver, differentiated by differences."""
    schedule, damping = task.denoiser.schedule, 1e-3
    solver = made(theta)
    best = (held_out.error(solver), solver)
    now = task.error(solver)
    for _ in range(iterations):
        base, step = numbers(solver, schedule), 1e-4
        chain = torch.stack(
            [(numbers(made(theta + step * e), schedule) - base) / step for e in torch.eye(len(theta)).double()], 1
        )
        hessian, gradient = normal_equations(task, solver)
        hessian, gradient = chain.T @ hessian @ chain, chain.T @ gradient
        before = now
        while damping < 1e2:
            scale = hessian.diagonal().diag()
            candidate = theta - torch.linalg.solve(hessian + damping * scale, gradient)
            try:
                after = task.error(made(candidate))
            except ValueError:  # times that fall no more
                after = float("inf")
            if after < now:
                theta, now, damping = candidate, after, damping / 10
                break
            damping *= 10
        solver = made(theta)
        best = min(best, (held_out.error(solver), solver), key=lambda row: row[0])
        if now > 0.999 * before:
            break
    return best[1]


def times_of(schedule: Schedule, log_rho: Tensor) -> Tensor:
    first, last = torch.tensor([schedule.t_max]).double(), torch.tensor([schedule.data_time]).double()
    return torch.cat([first, schedule.time_at(-log_rho), last])


def only_times(schedule: Schedule, solver: Solver, start: LearnedSolver) -> tuple[Made, Tensor]:
    """LD3's freedom: the times; the coefficients are the solver's own there."""
    theta = -schedule.log_snr(torch.tensor(start.times[1:], dtype=torch.float64))
    return lambda now: written(schedule, solver, times_of(schedule, now)), theta


def only_coefficients(schedule: Schedule, start: LearnedSolver) -> tuple[Made, Tensor]:
    """S4S's freedom: the coefficients of the predictions, the times stay."""
    free = torch.tensor([j > 0 for row in start.rows for j in range(len(row))])

    def made(now: Tensor) -> LearnedSolver:
        flat = torch.tensor([v for row in start.rows for v in row], dtype=torch.float64)
        flat[free] += now
        left = iter(flat.tolist())
        return LearnedSolver(start.schedule, start.times, tuple(tuple(next(left) for _ in row) for row in start.rows))

    return made, torch.zeros(int(free.sum()), dtype=torch.float64)


def consistent(schedule: Schedule, start: LearnedSolver) -> tuple[Made, Tensor]:
    """Times and coefficients whose sum is such that constant predictions are integrated exactly, with a = sigma_t /
    sigma_s: the freedom of a differentiable solver search."""
    calls = len(start.times)
    log_rho = -schedule.log_snr(torch.tensor(start.times[1:], dtype=torch.float64))
    weights = []
    for row in start.rows:
        total = sum(row[1:])
        weights += [c / total for c in row[2:]]
    theta = torch.cat([log_rho, torch.tensor(weights, dtype=torch.float64)])

    def made(now: Tensor) -> LearnedSolver:
        levels = Levels.of(schedule, times_of(schedule, now[: calls - 1]))
        left, rows = iter(now[calls - 1 :].tolist()), []
        for i in range(calls):
            a = levels.sigma[i + 1] / levels.sigma[i]
            total = levels.alpha[i + 1] - a * levels.alpha[i]
            past = [next(left) for _ in range(i)]
            rows.append((a, total * (1 - sum(past)), *(total * w for w in past)))
        return LearnedSolver(start.schedule, levels.times[:-1], tuple(rows))

    return made, theta


def adam(
    task: Task, held_out: Task, start: LearnedSolver, seconds: float, lr: float, batch: int
) -> tuple[LearnedSolver, int]:
    """Everything, by Adam through the sampler for so many seconds of processor time, cosine decay; the best of 20 looks
    at the held-out points."""
    schedule, calls = task.denoiser.schedule, len(start.times)
    state = numbers(start, schedule).requires_grad_()
    optimiser = torch.optim.Adam([state], lr)
    generator, best = torch.Generator().manual_seed(0), (held_out.error(start), start)
    began, looks, steps = time.process_time(), 1, 0
    while (spent := time.process_time() - began) < seconds:
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * spent / seconds))
        index = torch.randint(len(task.start), (batch,), generator=generator)
        x, ends, cond = task.start[index], task.ends[index], task.cond[index]
        with torch.enable_grad(), gradients(task.denoiser, "input"):
            outputs: list[Tensor] = []
            place = 0
            for i in range(calls):
                if i:
                    t = schedule.time_at(-state[place])
                    place += 1
                else:
                    t = torch.tensor(schedule.t_max, dtype=torch.float64)
                outputs.insert(0, task.denoiser(x, t.expand(batch), cond))
                row = state[place : place + i + 2].float()
                place += i + 2
                x = row[0] * x
                for c, output in zip(row[1:], outputs, strict=True):
                    x = x + c * output
            loss = (x - ends).flatten(1).square().mean(1).sqrt().mean()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        steps += 1
        if spent > looks * seconds / 20:
            looks += 1
            solver = moved(start, (state.detach() - numbers(start, schedule)).tolist(), schedule)
            if solver is not None:
                best = min(best, (held_out.error(solver), solver), key=lambda row: row[0])
    return best[1], steps


def bellman(task: Task, schedule: Schedule, calls: int, fine: int = 60) -> Tensor:
    """The times of a fine grid whose first-order steps from the fine trajectory's states have the least total square
    error (BOSS's dynamic programme)."""
    times = balanced(schedule, fine, 1.0)
    levels = Levels.of(schedule, times)
    states: list[Tensor] = []
    predictions: list[Tensor] = []

    class Watched(Denoiser):
        def forward(self, x: Tensor, t: Any, cond: Any = None) -> Tensor:
            states.append(x)
            predictions.append(task.denoiser(x, t, cond))
            return predictions[-1]

    watched = Watched(schedule, task.denoiser.shape, task.denoiser.classes)
    states.append(solve(watched, task.start, times, ABM(p=3, c=1.0), task.cond))
    cost = torch.full((fine + 1, fine + 1), float("inf"), dtype=torch.float64)
    for i in range(fine):
        for j in range(i + 1, fine + 1):
            a = levels.sigma[j] / levels.sigma[i]
            made = a * states[i] + (levels.alpha[j] - a * levels.alpha[i]) * predictions[i]
            cost[i, j] = float((made - states[j]).double().square().mean()) / max(levels.alpha[j], 1e-3) ** 2
    best = torch.full((calls + 1, fine + 1), float("inf"), dtype=torch.float64)
    best[0, 0] = 0
    came = torch.zeros(calls + 1, fine + 1, dtype=torch.long)
    for k in range(1, calls + 1):
        best[k], came[k] = (best[k - 1][:, None] + cost).min(0)
    path = [fine]
    for k in range(calls, 0, -1):
        path.insert(0, int(came[k, path[0]]))
    return times[path]


# tables


def ours(model: Denoiser, start: LearnedSolver, train: Reference, held_out: Reference) -> LearnedSolver:
    iterates: list[Iterate] = list(learning(model, start, train, held_out))
    return min(iterates, key=lambda it: it.held_out).solver


def row(
    name: str, model: Denoiser, solver: LearnedSolver, fresh: Reference, base: float, seconds: float | None
) -> float:
    mean, spread = error(model, solver, fresh)
    cost = "" if seconds is None else f"{seconds:.1f} s"
    print(f"| {name} | {mean:.4f} ± {spread:.4f} | {base / mean:.2f} | {cost} |", flush=True)
    return mean


def timed(make: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """What a function makes, and the seconds of the processor that it took."""
    start = time.process_time()
    made = make(*given)
    return made, time.process_time() - start


@torch.no_grad()
def compare(model: Denoiser, chosen: argparse.Namespace) -> dict[str, dict[int, float]]:
    """A table for every number of calls; the errors of the hand-made and the learned solver."""
    schedule, guidance = model.schedule, chosen.guidance
    began = time.process_time()
    train, held_out, fresh = (
        reference(model, n, seed, guidance)
        for seed, n in enumerate((chosen.train, max(32, chosen.train // 2), chosen.test))
    )
    print(f"references: {time.process_time() - began:.0f} s")
    seen, unseen = (Task.of(model, target, None) for target in (train, held_out))
    errors: dict[str, dict[int, float]] = {"unipc": {}, "best hand-made": {}, "learned": {}}

    for calls in chosen.calls:
        name, solver, start = hand_made(model, calls, train)
        base = error(model, start, fresh)[0]
        print(f"\n{calls} calls; the best hand-made is {name}\n\n| | error | gain | CPU |\n|---|---:|---:|---:|")
        usual = folded_named(schedule, "unipc", calls)
        errors["unipc"][calls] = row("`unipc`", model, usual, fresh, base, None)
        errors["best hand-made"][calls] = row("best hand-made", model, start, fresh, base, None)
        if not chosen.ours:
            grid, seconds = timed(bellman, seen, schedule, calls)
            row("DDIM on BOSS's times", model, written(schedule, DDIM(), grid), fresh, base, seconds)
            row("the same solver on BOSS's times", model, written(schedule, solver, grid), fresh, base, seconds)
            made, seconds = timed(reduced, seen, unseen, *only_times(schedule, solver, start))
            row("times (as LD3)", model, made, fresh, base, seconds)
            made, seconds = timed(reduced, seen, unseen, *only_coefficients(schedule, start))
            row("coefficients (as S4S)", model, made, fresh, base, seconds)
            made, seconds = timed(reduced, seen, unseen, *consistent(schedule, start))
            row("both, exact for constants (as solver search)", model, made, fresh, base, seconds)
        made, seconds = timed(ours, model, start, train, held_out)
        errors["learned"][calls] = row("all, Gauss-Newton", model, made, fresh, base, seconds)
        if not chosen.ours:
            for longer in (1, 10):
                (found, steps), spent = timed(adam, seen, unseen, start, longer * seconds, 1e-2, 32)
                row(f"all, Adam (as BNS), {steps} steps", model, found, fresh, base, spent)
    return errors


def folded_named(schedule: Schedule, name: str, calls: int) -> LearnedSolver:
    from fewstep.sampling.named import named_solver, named_times

    solver = named_solver(name)
    return written(schedule, solver, named_times(schedule, solver, calls, None))


@torch.no_grad()
def by_points(model: Denoiser, chosen: argparse.Namespace) -> None:
    """The error on fresh noise against the number of starting points that were learned from."""
    train, held_out, fresh = (
        reference(model, n, seed, chosen.guidance) for seed, n in enumerate((max(chosen.points), 128, chosen.test))
    )
    print("\n| starting points | " + " | ".join(f"{calls} calls" for calls in chosen.calls) + " |")
    print("|---" + "|---:" * len(chosen.calls) + "|")
    starts = [hand_made(model, calls, held_out)[2] for calls in chosen.calls]
    print("| none (hand-made) | " + " | ".join(f"{error(model, s, fresh)[0]:.4f}" for s in starts) + " |")
    for n in chosen.points:
        found = (ours(model, start, train.part(0, n), held_out.part(0, max(8, n // 2))) for start in starts)
        print(f"| {n} | " + " | ".join(f"{error(model, s, fresh)[0]:.4f}" for s in found) + " |", flush=True)


@torch.no_grad()
def transfer(model: Denoiser, chosen: argparse.Namespace) -> None:
    """Learned on one task, measured on others: guidance, classes."""
    n = chosen.train
    low, high = torch.arange(n) % 5, torch.arange(n) % 5 + 5
    tasks: dict[str, tuple[float | None, Tensor | None]] = {
        "no guidance": (None, None), "guidance 2": (2.0, None), "guidance 3": (3.0, None), "guidance 5": (5.0, None),
        "classes 0 to 4": (None, low), "classes 5 to 9": (None, high),
    }  # fmt: skip
    sets = {
        name: [reference(model, n, seed, guidance, cond) for seed in range(3)]
        for name, (guidance, cond) in tasks.items()
    }
    for calls in chosen.calls:
        print(f"\n{calls} calls\n\n| learned on | " + " | ".join(tasks) + " |\n|---" + "|---:" * len(tasks) + "|")
        starts = {name: hand_made(model, calls, train)[2] for name, (train, *_) in sets.items()}
        best = [error(model, starts[name], sets[name][2])[0] for name in tasks]
        print("| nothing: the best hand-made of each | " + " | ".join(f"{v:.4f}" for v in best) + " |")
        for name, (train, held_out, _) in sets.items():
            solver = ours(model, starts[name], train, held_out)
            print(
                f"| {name} | " + " | ".join(f"{error(model, solver, sets[m][2])[0]:.4f}" for m in tasks) + " |",
                flush=True,
            )


def picture(path: Path, title: str, errors: dict[str, dict[int, float]]) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5.5, 3.6), layout="constrained")
    axis = fig.subplots()
    for name, values in errors.items():
        axis.plot(list(values), list(values.values()), "o-", label=name)
    axis.set(xlabel="network calls", ylabel="distance from the reference", yscale="log", title=title)
    axis.legend()
    fig.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--calls", type=int, nargs="+", default=[4, 6, 8, 10])
    parser.add_argument("--train", type=int, default=256)
    parser.add_argument("--test", type=int, default=512)
    parser.add_argument("--ours", action="store_true", help="hand-made and learned only")
    parser.add_argument("--points", type=int, nargs="+")
    parser.add_argument("--transfer", action="store_true")
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    model: Any = api.load(chosen.model)
    if chosen.points:
        by_points(model, chosen)
    elif chosen.transfer:
        transfer(model, chosen)
    else:
        errors = compare(model, chosen)
        if chosen.picture:
            picture(chosen.picture, chosen.model, errors)


if __name__ == "__main__":
    main()
