"""The arithmetic of the Triton kernels, run by a stand-in for Triton's language on the CPU.

It shows that the kernels say what they should; it does not show that Triton compiles them, nor anything of a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.networks import attention
from fewstep.networks.attention import attend, attend_shard

NAME = "fewstep.networks.attention_triton"


@dataclass(frozen=True)
class Pointer:
    """A place in a tensor's memory, or a block of such places."""

    memory: Tensor
    at: Tensor | int = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


class Kernel:
    """A kernel that runs its programs one after the other."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body

    def __call__(self, *given: Any) -> Any:  # from another kernel
        return self.body(*given)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*given: Any, num_warps: int, num_stages: int, **known: Any) -> None:
            pointers = [Pointer(g.view(-1)) if isinstance(g, Tensor) else g for g in given]
            for PROGRAM[0] in range(grid[0]):
                self.body(*pointers, **known)

        return launch


PROGRAM = [0]


def load(place: Pointer, mask: Tensor, other: float) -> Tensor:
    """Outside of the mask nothing is read: a wrong address there would be no error on a GPU either."""
    values = place.memory[torch.where(mask, place.at, 0)]
    return torch.where(mask, values, torch.tensor(other, dtype=values.dtype))


def store(place: Pointer, values: Tensor, mask: Tensor) -> None:
    assert (place.memory[place.at[mask]] == UNWRITTEN).all(), "written twice, or somewhere else"
    place.memory[place.at[mask]] = values[mask].to(place.memory.dtype)


#: What results are filled with before a kernel runs.
UNWRITTEN = 12345.0


def dot(a: Tensor, b: Tensor, input_precision: str) -> Tensor:
    """Products in the type of the factors, sums in float32; both factors must be blocks that tensor cores take."""
    assert a.dtype == b.dtype and input_precision == "ieee"
    assert all(size >= 16 and size & (size - 1) == 0 for size in (*a.shape, *b.shape))
    return a.float() @ b.float()


def stand_in() -> tuple[ModuleType, ModuleType]:
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    triton.language, triton.jit = language, Kernel
    triton.cdiv, triton.next_power_of_2 = lambda a, b: -(-a // b), lambda n: 1 << (n - 1).bit_length()
    known = {
        "constexpr": int, "float32": torch.float32, "int64": torch.int64, "cdiv": triton.cdiv, "load": load,
        "store": store, "dot": dot, "trans": lambda x: x.T, "where": torch.where, "exp": torch.exp, "log": torch.log,
        "maximum": torch.maximum, "max": torch.amax, "sum": torch.sum, "arange": torch.arange,
        "full": lambda s, x, t: torch.full(s, x, dtype=t), "zeros": lambda s, t: torch.zeros(s, dtype=t),
        "program_id": lambda axis: torch.tensor(PROGRAM[axis], dtype=torch.int32),
    }  # fmt: skip
    for name, thing in known.items():
        setattr(language, name, thing)
    return triton, language


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported with the stand-in, on results that are filled with a mark first."""
    triton, language = stand_in()
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    import fewstep.networks.attention_triton as module

    monkeypatch.setattr(attention, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *s, dtype, device: torch.full(_sizes(s), UNWRITTEN, dtype=dtype))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full(x.shape, UNWRITTEN, dtype=x.dtype))
    yield module
    sys.modules.pop(NAME, None)
    import fewstep.networks as package

    monkeypatch.delattr(package, "attention_triton", raising=False)


def _sizes(given: Any) -> Any:
    return given[0] if isinstance(given[0], tuple | torch.Size) else given


def draws(seed: int, m: int, n: int, d: int, dv: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, *s, generator=gen).to(dtype) for s in ((m, d), (n, d), (n, dv)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 32, 16, 16), (70, 33, 20, 8), (5, 100, 64, 40), (130, 7, 33, 64)])
def test_the_kernels_are_the_tiles(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Value, logsumexp and both tangents, for tokens and features that fill a block and that do not; to the rounding of
    the weights in half precision."""
    primals, tangents = draws(0, *shape, dtype), draws(1, *shape, dtype)
    with torch.no_grad():
        made = [
            torch.func.jvp(lambda *a, kernel=kernel: tuple(attend_shard(*a, kernel=kernel)), primals, tangents)
            for kernel in ("triton", "blocked")
        ]
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(*made, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 2)])
def test_inputs_without_a_tangent(kernels: Any, which: tuple[int, ...]) -> None:
    primals, tangents = draws(0, 20, 40, 16, 16, torch.float32), draws(1, 20, 40, 16, 16, torch.float32)

    def slope(kernel: attention.Kernel) -> Tensor:
        def run(*some: Tensor) -> Tensor:
            return attend(*(some[which.index(i)] if i in which else p for i, p in enumerate(primals)), kernel=kernel)

        return torch.func.jvp(run, tuple(primals[i] for i in which), tuple(tangents[i] for i in which))[1]

    with torch.no_grad():
        torch.testing.assert_close(slope("triton"), slope("plain"), atol=2e-6, rtol=2e-6)


def test_gradients_are_those_of_the_tiles(kernels: Any) -> None:
    """Backwards, and through the tangent where a graph is recorded."""
    primals, tangents = draws(0, 20, 40, 16, 8, torch.float32), draws(1, 20, 40, 16, 8, torch.float32)
    held = [p.requires_grad_() for p in primals]

    def slopes(kernel: attention.Kernel) -> list[Tensor]:
        value, slope = torch.func.jvp(lambda *a: attend(*a, kernel=kernel), tuple(held), tangents)
        return list(torch.autograd.grad(value.sin().sum() + slope.sin().sum(), held))

    torch.testing.assert_close(slopes("triton"), slopes("plain"), atol=1e-5, rtol=1e-5)


def test_they_are_chosen_where_they_agree(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By "auto" on a GPU, after a look; a kernel that is wrong or does not compile is named and left."""
    cpu = torch.device("cpu")
    assert kernels.agrees(cpu, torch.float32, 16, 8) and kernels.agrees(cpu, torch.bfloat16, 64, 64)
    body = kernels.slope_kernel.body
    monkeypatch.setattr(kernels.slope_kernel, "body", lambda *a, **k: body(*a, **k | {"HAS_TK": False}))
    with pytest.warns(UserWarning, match="triton is off by"):
        assert not kernels.agrees(cpu, torch.float16, 16, 16)
    monkeypatch.setattr(kernels.slope_kernel, "body", lambda *a: 1 / 0)
    with pytest.warns(UserWarning, match="triton fails on cpu"):
        assert not kernels.agrees(cpu, torch.float32, 32, 16)

    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(attention, "has_tangent", lambda x: True)
    q, k, v = draws(0, 150, 150, 16, 8, torch.float32)
    assert attention.choose(q, k, v, None) == "triton"
    assert attention.choose(q, k, v, torch.zeros(150, 150)) == "blocked"
    assert attention.choose(q.double(), k.double(), v.double(), None) == "blocked"
    assert attention.choose(*draws(0, 150, 150, 80, 8, torch.float32), None) == "blocked"
    assert attention.choose(*draws(0, 150, 150, 32, 16, torch.float32), None) == "blocked"  # it failed above


def test_what_they_do_not_take_is_said(kernels: Any) -> None:
    q, k, v = draws(0, 20, 40, 16, 8, torch.float32)
    for given, said in (
        ((q.double(), k.double(), v.double()), "torch.float64, 16 and 8 features"),
        ((q, k, v, torch.ones(20, 40, dtype=torch.bool)), "a mask; it takes"),
        (draws(0, 20, 40, 128, 8, torch.float32), "at most 256 bytes"),
    ):
        with pytest.raises(ValueError, match=said):
            attend(*given, kernel="triton")
