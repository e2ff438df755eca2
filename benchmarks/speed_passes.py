"""What a method costs besides its network passes: any method, against its own passes replayed bare, in one run.

    python benchmarks/speed_passes.py [--methods scm ctm mean-flow] [--batch 32] [--rounds 12]

Every call of a network in an iteration is recorded: of which network (the heads of a discriminator are one), the whole
pass or the one that ends at its features, with how many samples, without a graph, with one for its weights, its input
or both, or under a forward-mode derivative.  Then the same calls are made bare, in plain PyTorch with fused Adam:
random inputs of the same shapes, the sum of squares as the loss, no draws, checks, averages or records.  What is
printed is the median ratio of neighbours, of all kinds of iterations as often as they come, and the median difference
in milliseconds on a network so small that its passes cost next to nothing.  Processor time, one thread.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
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
from fewstep.methods.parts.adversary import Discriminator
from fewstep.methods.start import Start
from fewstep.training.budget import Budget
from fewstep.training.parallel import Parallel
from fewstep.training.trainer import Run, Settings

FAMILIES = ("consistency", "flow_maps", "matching")


@dataclass(frozen=True)
class Call:
    """One call of a network or of its pass to the features: shapes and types of what it was given, by name; which of
    it had a tangent; and what the graph is for."""

    network: str
    entry: str
    given: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    tangents: tuple[str, ...]
    for_weights: bool
    for_inputs: bool


def parts_of(nets: Networks) -> dict[str, nn.Module]:
    """The raw networks by the name of their denoiser, each once, and discriminators."""
    found: dict[str, nn.Module] = {}
    for name, part in nets.named_modules():
        net = part.net if type(part) is NetworkDenoiser else part if isinstance(part, Discriminator) else None
        if net is not None and all(net is not other for other in found.values()):
            found[name] = net
    return found


def recorded(nets: Networks, calls: list[Call]) -> None:
    """Have every call of a raw network written down."""

    def write(name: str, entry: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # a discriminator is given a list of features, another network tensors
        listed = args[0] if args and isinstance(args[0], list) else []
        places = {f"{k}": value for k, value in enumerate(listed)}
        named = places or {**dict(zip(("x", "t", "cond"), args, strict=False)), **kwargs}
        tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        moving = tuple(k for k, v in tensors.items() if forward_ad.unpack_dual(v).tangent is not None)
        graph = torch.is_grad_enabled()
        own = graph and any(p.requires_grad for p in module.parameters())
        through = graph and any(value.requires_grad for value in tensors.values())
        shapes = tuple((k, tuple(v.shape), v.dtype) for k, v in tensors.items())
        calls.append(Call(name, entry, shapes, moving, own, through))

    for name, module in parts_of(nets).items():
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: write(name, "forward", module, args, kwargs), with_kwargs=True
        )
        if (features := getattr(module, "features", None)) is not None:

            def told(*args: Any, name=name, module=module, features=features, **kwargs: Any) -> Tensor:
                write(name, "features", module, args, kwargs)
                found: Tensor = features(*args, **kwargs)
                return found

            module.features = told


def inputs_for(call: Call) -> dict[str, Tensor]:
    """Random inputs of the recorded shapes."""
    made = {}
    for key, shape, kind in call.given:
        made[key] = torch.rand(shape, dtype=kind) if kind.is_floating_point else torch.zeros(shape, dtype=kind)
        if call.for_inputs and kind.is_floating_point and key not in ("t", "s", "w"):
            made[key].requires_grad_()
    return made


def replay(nets: Networks, optimisers: list[torch.optim.Optimizer], calls: list[Call], given: list[Any]) -> None:
    """The passes of an iteration, and one step of every optimizer."""
    modules = parts_of(nets)
    outputs: list[Tensor] = []
    for call, inputs in zip(calls, given, strict=True):
        net: Any = modules[call.network]
        entry = net if call.entry == "forward" else net.features
        if call.tangents:
            names = call.tangents
            still = {key: value for key, value in inputs.items() if key not in names}
            point = tuple(inputs[name] for name in names)

            def field(*moved: Tensor, entry=entry, names=names, still=still) -> Tensor:
                out: Tensor = entry(**still, **dict(zip(names, moved, strict=True)))
                return out

            with torch.no_grad():
                torch.func.jvp(field, point, tuple(map(torch.ones_like, point)))
            continue
        graph = call.for_weights or call.for_inputs
        if graph:
            for p in net.parameters():
                p.requires_grad_(call.for_weights)
        with torch.set_grad_enabled(graph):
            if isinstance(net, Discriminator):
                features = list(inputs.values())
                out = net(features, torch.zeros(len(features[0]), dtype=torch.float64))
            else:
                out = entry(**inputs)
        if graph:
            outputs.append(out)
    loss = torch.stack([out.square().mean() for out in outputs]).sum()
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward()
    for optimiser in optimisers:
        optimiser.step()
    with torch.no_grad():
        for name in nets.moved:
            if mine := list(getattr(nets, name).parameters()):
                torch._foreach_lerp_(mine, [p.detach().clone() for p in mine], 0.5)


def begin(big: bool) -> Start:
    """A teacher with random weights, the last layer's too (zeros there leave gradients too small for fast kernels), and
    data."""
    model = teacher(big)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(0))
    x = torch.randn(256, *model.shape, generator=torch.Generator().manual_seed(0))
    data = Dataset("random", x, torch.arange(256) % 10, columns={"noise": x.flip(0)})
    return Start(model, data, keep=lambda store, seed: data)  # in place of pairs


class Compared(NamedTuple):
    """Milliseconds of an iteration, ours and bare, and their ratio neighbour by neighbour, medians of each kind of
    iteration averaged over the kinds; the median difference; the passes of the last one in words; what the next stage
    of a recipe starts from."""

    ours: float
    bare: float
    ratio: float
    difference: float
    passes: str
    following: Start


def compare(method: Method, start: Start, batch: int, rounds: int) -> Compared:
    """A method's iterations in turns with its passes alone."""
    data = method.sources(start)
    nets = method.networks(start)
    bare = copy.deepcopy(nets)
    optimisers = [torch.optim.Adam(bare.group_parameters(group), 1e-4, fused=True) for group in bare.groups]
    calls: list[Call] = []
    recorded(nets, calls)
    run = Run(method, nets, Settings(Budget(10**6), batch=batch, precision="fp32"), Parallel())
    times: dict[tuple[Call, ...], list[tuple[float, float]]] = {}
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
            times.setdefault(tuple(passes), []).append((1e3 * ours, 1e3 * plain))
    tangents, graphs = sum(bool(c.tangents) for c in passes), sum(c.for_weights or c.for_inputs for c in passes)
    words = f"{len(passes) - tangents - graphs} plain, {tangents} tangent, {graphs} with a graph"
    total, of_bare, of_ours = 0.0, 0.0, 0.0
    for pairs in times.values():
        typical = len(pairs) * statistics.median(plain for _, plain in pairs)
        of_bare += typical
        of_ours += len(pairs) * statistics.median(ours for ours, _ in pairs)
        total += typical * statistics.median(ours / plain for ours, plain in pairs)
    difference = statistics.median(ours - plain for pairs in times.values() for ours, plain in pairs)
    following = dataclasses.replace(start, made={**start.made, **method.hands_on(nets)})
    return Compared(of_ours / rounds, of_bare / rounds, total / of_bare, difference, words, following)


def narrowed(method: Method) -> Method:
    """The same with low-rank weights that a small network has place for."""
    return dataclasses.replace(method, rank=1) if hasattr(method, "rank") else method  # type: ignore[call-arg]


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
            if method.name in shown or stage.needs:  # a reward, which is somebody's own
                continue
            shown.add(method.name)
            big = compare(method, large, chosen.batch, chosen.rounds)
            little = compare(narrowed(method), small, 8, 60)
            large, small = big.following, little.following
            label = name if name == method.name else f"{name}: {method.name}"
            row = f"{big.ours:10.1f}{big.bare:10.1f}{big.ratio:8.3f}{little.difference:10.2f}"
            print(f"{label:38}{row}  {big.passes}", flush=True)


if __name__ == "__main__":
    main()
