"""Forward-mode derivatives of diffusers' networks, whose attention and norms have none as they are: against central
differences, and in training, in both precisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_pipelines import dit, flux, sana, sd3, unet2d, unet2d_condition
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

import fewstep as fs  # noqa: E402
from fewstep.data import Dataset  # noqa: E402
from fewstep.denoisers import NetworkDenoiser  # noqa: E402
from fewstep.hub.diffusers import wrap  # noqa: E402
from fewstep.methods.consistency.scm import ContinuousConsistencyDistillation  # noqa: E402
from fewstep.networks import attention, attention_blocked  # noqa: E402
from fewstep.predictions import retimed  # noqa: E402
from fewstep.tangents import finite_difference, tangent  # noqa: E402
from fewstep.training import precision, trainer  # noqa: E402

NETWORKS: dict[str, Callable[[], Any]] = {
    "unet": unet2d, "text unet": unet2d_condition, "dit": dit, "sd3": lambda: sd3().transformer,
    "flux": lambda: flux().transformer, "sana": lambda: sana().transformer,
}  # fmt: skip
FLOW = ("sd3", "flux", "sana")


def teacher(name: str, network: Any = None, size: int = 8) -> NetworkDenoiser:
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if name in FLOW else diffusers.DDIMScheduler()
    made = wrap((network or NETWORKS[name]()).float(), scheduler, size=(size, size))
    if hasattr(made.net, "set_null"):
        rows = {k: [3 if side is None else side for side in shape] for k, shape in made.net.needs().items()}
        made.net.set_null({k: torch.randn(1, *shape) for k, shape in rows.items()})
    return made


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_is_the_derivative(name: str) -> None:
    """In float64, where the difference has an error of step^2, and under autocast to the precision of bfloat16; the
    value is that of a plain call."""
    model = teacher(name)
    x, dx = torch.randn(2, 2, *model.shape, generator=torch.Generator().manual_seed(1)).unbind()
    top = model.schedule.t_max
    t, dt = torch.tensor([0.3 * top, 0.7 * top], dtype=torch.float64), torch.full((2,), 0.1 * top, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        rough, rough_slope = tangent(model.forward, x, t, dx, dt)
        plain = model(x, t)
    exact = model.double()
    value, slope = tangent(exact.forward, x.double(), t, dx.double(), dt)
    still = torch.zeros_like(t)  # diffusers embeds times in float32, which a difference cannot see through
    _, along_x = tangent(exact.forward, x.double(), t, dx.double(), still)
    again, difference = finite_difference(exact.forward, x.double(), t, dx.double(), still, step=1e-3)

    def off(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    assert off(value, again) < 1e-12 and off(along_x, difference) < 1e-3  # Sana has kinks
    assert off(rough, value) < 0.03 and off(rough_slope, slope) < 0.06
    assert off(plain, value) < 0.03


@pytest.mark.parametrize("name", ["unet", "text unet", "dit", "sd3", "flux"])
def test_many_tokens_take_linear_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 tokens or more no tensor is as large as the scores of one head, and the tangent is the derivative."""
    made = NETWORKS[name]()
    if name == "sd3":
        made = diffusers.SD3Transformer2DModel.from_config({**made.config, "pos_embed_max_size": 16})
    model = teacher(name, made, 32).double()
    chosen: list[str] = []
    choose = attention.choose
    monkeypatch.setattr(attention, "choose", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    monkeypatch.setattr(attention_blocked, "ROWS", 32)
    monkeypatch.setattr(attention_blocked, "COLUMNS", 48)
    x, dx = torch.randn(2, 1, *model.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    t, still = torch.tensor([0.3 * model.schedule.t_max], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    with Largest() as seen:
        value, slope = tangent(model.forward, x, t, dx, still)
    assert "blocked" in chosen
    assert seen.numbers < 256**2
    again, difference = finite_difference(model.forward, x, t, dx, still, step=1e-4)
    assert float((value - again).abs().max()) < 1e-12
    assert float((slope - difference).norm() / slope.norm()) < 1e-5


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation makes, weights aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("name", ["unet", "text unet", "sd3", "sana"])
def test_scm_trains_a_diffusers_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told the angle; where "auto" takes bfloat16 the first losses and gradients are those of float32, and so they are
    where the network makes its activations again in the backward pass."""
    model = teacher(name)
    model.prediction = retimed(model.prediction)
    data = Dataset("noise", torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(2)))
    monkeypatch.setattr(precision, "probe", lambda device: {"fp32": 1.0, "bf16": 0.1})
    records: list[list[dict[str, float]]] = []
    plain = trainer.loop
    monkeypatch.setattr(trainer, "loop", lambda *given: records.append(plain(*given)) or records[-1])
    recipe = ContinuousConsistencyDistillation(tangent_warmup=0.0)
    for kind in ("fp32", "auto"):
        fs.distill(model, recipe, data, "1steps", batch=8, precision=kind, log_steps=1, show=False)
    remade: list[Any] = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: remade.append(a[0]) or checkpoint(*a, **k)
    )
    network_of(model).enable_gradient_checkpointing()
    fs.distill(model, recipe, data, "1steps", batch=8, precision="fp32", log_steps=1, show=False)
    assert remade
    exact, rough, again = (lines[0] for lines in records)
    for key in ("student/loss", "student/tangent_norm", "student/grad_norm"):
        assert rough[key] == pytest.approx(exact[key], rel=0.05), key
        assert again[key] == pytest.approx(exact[key], rel=1e-5), key


def network_of(model: NetworkDenoiser) -> Any:
    """The network of diffusers inside."""
    return next(m for m in model.modules() if isinstance(m, diffusers.ModelMixin))
