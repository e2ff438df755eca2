"""What a tangent through attention costs: PyTorch's written-out form against ours, in time and memory, in one run.

    python benchmarks/attention.py [--tokens 256 1024 4096] [--heads 4] [--features 64] [--repeats 5] [--device cuda]

Self-attention of one sample in float32 (bfloat16 on a GPU), one thread on a CPU.  A tangent is one ``torch.func.jvp``
along q, k and v, without a graph.  Times are the least of some repeats, taken in turn, on a CPU of processor time, so
that other work on the machine matters little.  Memory is the most that a call held at once beside its inputs: on a CPU
that of a process of its own (Linux), on a GPU what the allocator says.  The ratios are what to read.  A last column
compares the tangent with the plain call that "auto" makes, PyTorch's fused kernel.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fewstep.networks.attention import attend

Inputs = tuple[Tensor, Tensor, Tensor]


def written_out(*given: Tensor) -> Tensor:
    """PyTorch's only form with a forward-mode rule."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*given)


FORMS: dict[str, Callable[..., Tensor]] = {
    "PyTorch's": written_out,
    "plain": lambda *given: attend(*given, kernel="plain"),
    "blocked": lambda *given: attend(*given, kernel="blocked"),
    "triton": lambda *given: attend(*given, kernel="triton"),
}


def inputs(tokens: int, heads: int, features: int, device: str) -> tuple[Inputs, Inputs]:
    gen = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    made = torch.randn(6, 1, heads, tokens, features, generator=gen).to(device, dtype)
    return tuple(made[:3]), tuple(made[3:])


@torch.no_grad()
def tangent(form: str, primals: Inputs, tangents: Inputs) -> Any:
    return torch.func.jvp(FORMS[form], primals, tangents)


def seconds(work: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def held_on_cpu(form: str, sizes: tuple[int, int, int], queue: Any) -> None:
    """In a process of its own: how many bytes more than before the work were held at most."""
    torch.set_num_threads(1)
    given = inputs(*sizes, "cpu")
    tangent(form, *inputs(8, 1, 16, "cpu"))  # what is loaded once is not counted
    Path("/proc/self/clear_refs").write_text("5")  # begin the maximum again
    before = most_held()
    tangent(form, *given)
    queue.put(most_held() - before)


def most_held() -> int:
    """The most bytes that this process has held (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def held(form: str, sizes: tuple[int, int, int], device: str) -> float:
    """MiB held at most beside the inputs."""
    if device != "cpu":
        given = inputs(*sizes, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tangent(form, *given)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=held_on_cpu, args=(form, sizes, queue))
    child.start()
    bytes_held = queue.get()
    child.join()
    return bytes_held / 2**20


def lines(forms: list[str], sizes: tuple[int, int, int], repeats: int, device: str) -> Iterator[str]:
    """The rows of the table for one number of tokens."""
    given = inputs(*sizes, device)
    work: dict[str, Callable[[], Any]] = {form: partial(tangent, form, *given) for form in forms}
    work["call"] = partial(attend, *given[0])
    with torch.no_grad():
        rounds = [{name: seconds(call, device) for name, call in work.items()} for _ in range(repeats + 1)]
    best = {name: 1e3 * min(times[name] for times in rounds[1:]) for name in work}  # the first warms up
    memory = {form: held(form, sizes, device) for form in forms}
    for form in forms:
        longer, larger = best[form] / best[forms[0]], memory[form] / max(memory[forms[0]], 1e-3)
        yield (
            f"| {sizes[0]:,} | {form} | {best[form]:,.1f} | {longer:.2f} | {memory[form]:,.0f} | {larger:.2f} | "
            f"{best[form] / best['call']:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    forms = [form for form in FORMS if form != "triton" or (args.device != "cpu" and find_spec("triton"))]
    name = platform.processor() or platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {name}; {args.heads} heads of {args.features} features\n")
    print("| tokens | tangent through | ms | ratio | MiB | ratio | over a plain call |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for tokens in args.tokens:
        for line in lines(forms, (tokens, args.heads, args.features), args.repeats, args.device):
            print(line, flush=True)


if __name__ == "__main__":
    main()
