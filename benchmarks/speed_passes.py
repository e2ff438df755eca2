"""What a method costs besides its network passes: any method, against its own passes replayed bare, in one run.

    python benchmarks/speed_passes.py [--methods scm ctm mean-flow] [--batch 32] [--rounds 12]

Every call of a network in an iteration is recorded: of which network, with how many samples, without a graph, with
one, or under a forward-mode derivative.  Then the same calls are made bare, in plain PyTorch with fused Adam: random
inputs of the same shapes, the sum of squares as the loss, no draws, checks, averages or records.  What is printed is
the median ratio of neighbours, and the median difference in milliseconds on a network so small that its passes cost
next to nothing.  Processor time, one thread.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from speed_training import teacher
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.method import Method, Networks
from fewstep.methods.start import Start
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.trainer import Run, Settings

FAMILIES = ("consistency", "flow_maps")


@dataclass(frozen=True)
class Call:
    """One call of a network: shapes and types of what it was given, by name, and which of it had a tangent."""

    network: str
    given: dict[str, tuple[tuple[int, ...], torch.dtype]]
    tangents: tuple[str, ...]
    graph: bool
    through_input: bool


def parts_of(nets: Networks) -> dict[str, nn.Module]:
    """The raw networks by the name of their denoiser."""
    return {name: part.net for name, part in nets.named_modules() if type(part) is NetworkDenoiser}


def recorded(nets: Networks, calls: list[Call]) -> None:
    """Have every call of a raw network written down."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {**dict(zip(("x", "t", "cond"), args, strict=False)), **kwargs}
            tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
            moving = tuple(k for k, v in tensors.items() if forward_ad.unpack_dual(v).tangent is not None)
            own = any(p.requires_grad for p in module.parameters())
            graph = torch.is_grad_enabled() and (own or tensors["x"].requires_grad)
            shapes = {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()}
            calls.append(Call(name, shapes, moving, graph, graph and tensors["x"].requires_grad))

        return write

    for name, module in parts_of(nets).items():
        module.register_forward_pre_hook(hook(name), with_kwargs=True)


def inputs_for(call: Call) -> dict[str, Tensor]:
    """Random inputs of the recorded shapes."""
    made = {}
    for key, (shape, kind) in call.given.items():
        made[key] = torch.rand(shape, dtype=kind) if kind.is_floating_point else torch.zeros(shape, dtype=kind)
    made["x"].requires_grad_(call.through_input)
    return made


def replay(nets: Networks, optimisers: list[torch.optim.Optimizer], calls: list[Call], given: list[Any]) -> None:
    """The passes of an iteration, and one step of every optimizer."""
    modules = parts_of(nets)
    outputs: list[Tensor] = []
    for call, inputs in zip(calls, given, strict=True):
        net = modules[call.network]
        if call.tangents:
            names = call.tangents
            still = {key: value for key, value in inputs.items() if key not in names}
            point = tuple(inputs[name] for name in names)

            def field(*moved: Tensor, net=net, names=names, still=still) -> Tensor:
                out: Tensor = net(**still, **dict(zip(names, moved, strict=True)))
                return out

            with torch.no_grad():
                torch.func.jvp(field, point, tuple(map(torch.ones_like, point)))
        elif call.graph:
            outputs.append(net(**inputs))
        else:
            with torch.no_grad():
                net(**inputs)
    loss = torch.stack([out.square().mean() for out in outputs]).sum()
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward()
    for optimiser in optimisers:
        optimiser.step()
    with torch.no_grad():
        for name in nets.moved:
            mine = list(getattr(nets, name).parameters())
            torch._foreach_lerp_(mine, [p.detach().clone() for p in mine], 0.5)


def begin(big: bool) -> Start:
    """A teacher with random weights, the last layer's too (zeros there leave gradients too small for fast kernels), and
    data."""
    model = teacher(big)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(0))
    x = torch.randn(256, *model.shape, generator=torch.Generator().manual_seed(0))
    return Start(model, Dataset("random", x, torch.arange(256) % 10, columns={"noise": x.flip(0)}))


class Compared(NamedTuple):
    """Median milliseconds of an iteration, ours and bare; medians of their ratio and difference, neighbour by
    neighbour; its passes in words; what the next stage of a recipe starts from."""

    ours: float
    bare: float
    ratio: float
    difference: float
    passes: str
    following: Start


def compare(method: Method, start: Start, batch: int, rounds: int) -> Compared:
    """A method's iterations in turns with its passes alone."""
    data = start.data
    nets = method.networks(start)
    bare = copy.deepcopy(nets)
    optimisers = [torch.optim.Adam(bare.group_parameters(group), 1e-4, fused=True) for group in bare.groups]
    calls: list[Call] = []
    recorded(nets, calls)
    run = Run(method, nets, Settings(Budget(10**6), batch=batch, precision="fp32"), Parallel())
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(rounds + 2):
        calls.clear()
        begun = time.process_time()
        run.step(data)
        ours = time.process_time() - begun
        passes = list(calls)
        given = [inputs_for(call) for call in passes]
        begun = time.process_time()
        replay(bare, optimisers, passes, given)
        plain = time.process_time() - begun
        if k >= 2:
            times[0].append(1e3 * ours)
            times[1].append(1e3 * plain)
    kinds = [sum(bool(c.tangents) for c in passes), sum(c.graph and not c.tangents for c in passes)]
    words = f"{len(passes) - sum(kinds)} plain, {kinds[0]} tangent, {kinds[1]} with a graph"
    pairs = list(zip(*times, strict=True))
    ratio = statistics.median(ours / plain for ours, plain in pairs)
    difference = statistics.median(ours - plain for ours, plain in pairs)
    following = dataclasses.replace(start, made={**start.made, **method.hands_on(nets)})
    return Compared(*map(statistics.median, times), ratio, difference, words, following)


def main() -> None:
    family = [name for name, place in RECIPES.items() if place.split(".")[2] in FAMILIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="samples an iteration on the larger network")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of iterations measured on the larger network")
    parser.add_argument("--methods", nargs="+", choices=family, default=family)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'method':38}{'ours ms':>10}{'bare ms':>10}{'ratio':>8}{'fixed ms':>10}  passes of the last iteration")
    for name in chosen.methods:
        large, small, shown = begin(True), begin(False), set()
        for stage in recipe_class(name)().stages():
            method = stage.method
            if method.name in shown:
                continue
            shown.add(method.name)
            big = compare(method, large, chosen.batch, chosen.rounds)
            little = compare(method, small, 8, 60)
            large, small = big.following, little.following
            label = name if name == method.name else f"{name}: {method.name}"
            row = f"{big.ours:10.1f}{big.bare:10.1f}{big.ratio:8.3f}{little.difference:10.2f}"
            print(f"{label:38}{row}  {big.passes}", flush=True)


if __name__ == "__main__":
    main()
