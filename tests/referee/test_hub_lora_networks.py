"""Low-rank weights on diffusers' networks as networks: how few they are, on one process and cut over two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from child_processes import run_on_two  # noqa: E402
from tiny_pipelines import ddim, unet2d_condition  # noqa: E402

from fewstep.data.dataset import Dataset  # noqa: E402
from fewstep.denoisers import Denoiser  # noqa: E402
from fewstep.files import load_tensors, save_tensors  # noqa: E402
from fewstep.hub import lora  # noqa: E402
from fewstep.hub.diffusers import wrap  # noqa: E402
from fewstep.methods.method import Batch, Method, Networks, Optimizer, Paper, Progress, Update  # noqa: E402
from fewstep.methods.start import Start  # noqa: E402
from fewstep.networks.lora import LowRank, factors, factors_in, low_rank, moving  # noqa: E402
from fewstep.training.budget import Budget  # noqa: E402
from fewstep.training.settings import Settings  # noqa: E402
from fewstep.training.trainer import train  # noqa: E402


def numbers(weights: Any) -> int:
    return sum(weight.numel() for weight in weights)


def teacher() -> Denoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = unet2d_condition()
    return wrap(model, ddim())


def test_stable_diffusion_2_has_as_many_as_were_counted_by_hand() -> None:
    """3,319,808 numbers of rank 16 on the attention of the real network of 866 million, 0.4% of it."""
    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel(
            sample_size=96, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024, use_linear_projection=True,
        )  # fmt: skip
    copied = low_rank(net, 16)
    assert numbers(net.parameters()) == 865_910_724
    assert numbers(moving(copied)) == 3_319_808 and len(factors_in(copied)) == 16 * 8


def test_less_than_a_twentieth_trains_by_default() -> None:
    """On the attention projections of a small U-Net."""
    whole = teacher()
    copied = lora.attach(whole)
    assert 0 < numbers(moving(copied)) < 0.05 * numbers(whole.parameters())
    assert all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in factors_in(copied))


@dataclass(frozen=True)
class Pulled(Method):
    """A low-rank student is pulled along the difference of its teacher and a low-rank critic on one network."""

    name: ClassVar[str] = "pulled"
    paper: ClassVar[Paper] = Paper("a test", "0000.00000", "reconstructed")

    def networks(self, start: Start) -> Networks:
        modules = {role: start.network(role, low_rank=LowRank()) for role in ("student", "critic")}
        groups = {name: Optimizer((name,), 1e-3) for name in modules}
        return Networks({**modules, "teacher": start.teacher}, groups, ema=("student",))

    def updates(self, nets: Networks, batch: Batch, progress: Progress) -> Iterator[Update]:
        x = nets.student(batch.normal(), 900.0, batch.cond)
        noised = x.detach() + batch.normal()
        yield Update("critic", (nets.critic(noised, 300.0, batch.cond) - x.detach()).square().mean())
        with torch.no_grad():
            pull = nets.critic(noised, 300.0, batch.cond) - nets.teacher(noised, 300.0, batch.cond)
        yield Update("student", (x * pull + x.square()).mean())

    def student(self, nets: Networks) -> Denoiser:
        made: Denoiser = nets.student
        return made


def trained(shard: bool) -> tuple[list[dict[str, Any]], nn.Module]:
    gen = torch.Generator().manual_seed(2)
    prompts = torch.randn(4, 7, 6, generator=gen)
    data = Dataset("latents", torch.randn(4, 4, 8, 8, generator=gen), prompts)
    chosen = Settings(Budget(3), 4, precision="fp32", log_steps=1, shard=shard)
    result = train(Pulled(), Start(teacher(), data), chosen, show=False)
    return result.records, result.model


def process(rank: int, folder: Path) -> None:
    records, model = trained(shard=True)
    if rank == 0:
        (folder / "records.json").write_text(json.dumps(records))
        save_tensors(folder / "factors.safetensors", factors(model))


def test_two_processes_that_cut_the_base_make_the_run_of_one(tmp_path: Path) -> None:
    run_on_two(process, tmp_path)
    records, model = trained(shard=False)
    there = json.loads((tmp_path / "records.json").read_text())
    keys = [key for key in records[0] if key.endswith(("/loss", "/grad_norm"))]
    assert len(there) == len(records) == 3 and len(keys) == 4
    for mine, other in zip(records, there, strict=True):
        for key in keys:
            assert abs(mine[key] - other[key]) < 2e-5 * abs(mine[key]) + 1e-7, (mine["step"], key)
    found = load_tensors(tmp_path / "factors.safetensors")
    for name, weight in factors(model).items():
        torch.testing.assert_close(weight, found[name], rtol=0, atol=2e-5)
