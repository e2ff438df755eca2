"""What the operations of a network cost with a tangent: PyTorch's forward-mode rules against ours, in one run.

    python benchmarks/forward_rules.py [--rounds 40]

The operations of a U-Net and of a transformer on a small and a larger input, by dual numbers with PyTorch's own rules
and under :class:`fewstep.tangents.ForwardRules`, in turns; and the call without a tangent.  Median microseconds of one
thread, and ours over PyTorch's.  At the end a whole tangent of the U-Net of the bundled digits teacher.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from speed_fixed import alternate
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

import fewstep as fs
from fewstep.tangents import ForwardRules

WEIGHT = torch.rand(64)
LINEAR = torch.rand(64, 64)
OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "times a number": (lambda x: 0.5 * x, "pictures"),
    "plus a tensor": (lambda x: x + WEIGHT.view(64, 1, 1), "pictures"),
    "group norm": (lambda x: functional.group_norm(x, 8, WEIGHT, WEIGHT), "pictures"),
    "layer norm": (lambda x: functional.layer_norm(x, (64,), WEIGHT, WEIGHT), "tokens"),
    "rms norm": (lambda x: functional.rms_norm(x, (64,), WEIGHT), "tokens"),
    "linear layer": (lambda x: functional.linear(x, LINEAR, WEIGHT), "tokens"),
}
SIZES = {"pictures": ((1, 64, 4, 4), (32, 64, 16, 16)), "tokens": ((1, 16, 64), (32, 256, 64))}


def with_tangent(function: Callable[[Tensor], Tensor], x: Tensor, ours: bool) -> None:
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        if ours:
            with ForwardRules():
                function(dual)
        else:
            function(dual)


def plain(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        function(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="times that everything is done")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{'operation':18}{'shape':>18}{'no tangent':>12}{'PyTorch':>10}{'ours':>10}{'ratio':>8}")
    cases = [
        (name, function, torch.rand(shape)) for name, (function, kind) in OPERATIONS.items() for shape in SIZES[kind]
    ]
    model = fs.load("digits")
    t = torch.rand(32, dtype=torch.float64)
    labels = torch.arange(32) % 10
    cases.append(("digits teacher", lambda x: model.velocity(x, t, labels), torch.rand(32, *model.shape)))
    for name, function, x in cases:
        ways = [
            lambda f=function, x=x: plain(f, x),
            lambda f=function, x=x: with_tangent(f, x, False),
            lambda f=function, x=x: with_tangent(f, x, True),
        ]
        bare, theirs, ours = (1e3 * ms for ms in alternate(ways, rounds))
        shape = "x".join(map(str, x.shape))
        print(f"{name:18}{shape:>18}{bare:12.0f}{theirs:10.0f}{ours:10.0f}{ours / theirs:8.2f}", flush=True)


if __name__ == "__main__":
    main()
