"""MDT-dist on a flow of solids: a teacher of voxels, its student in one call and two, and the teacher in as many.

    python benchmarks/mdt_dist.py                            trains both (about two minutes each on one core) into runs/
    python benchmarks/mdt_dist.py --picture docs/img/mdt-dist.png

Models that their run folders hold are not trained again.  A row says how much space a sample shares with the nearest of
the training solids, and for how many that one is of the class that was asked for; the same of held-out solids is what
can be reached.  The Fréchet distance is that of how far each block of 3x3x3 voxels is filled.  The picture shows the
same noise through every model.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fewstep import api
from fewstep.data import load as load_data
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods.flow_maps.mdt_dist import MDTDist
from fewstep.methods.teachers.denoising import FlowMatchingTraining
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.occupancy import nearest
from fewstep.networks import UNet3d
from fewstep.predictions import Velocity
from fewstep.sampling import sample
from fewstep.schedules import FlowMatching

matplotlib.use("Agg")
from matplotlib import pyplot

#: The view: turned by so much around the vertical axis, and down; the light from the upper left in front.
TURN, TILT, LIGHT = math.radians(35), math.radians(28), (-0.45, 0.75, 0.5)


def render(x: Tensor, size: int = 72, steps: int = 120) -> Tensor:
    """Grey pictures ``[N, size, size]`` of the surface where voxels ``[N, 1, D, H, W]``, read between their centres,
    pass 0; parallel rays from the front."""
    across = torch.linspace(-1.15, 1.15, size)
    depth = torch.linspace(1.8, -1.8, steps)
    w, v, u = torch.meshgrid(depth, -across, across, indexing="ij")  # to the viewer, up, right
    up, away = v * math.cos(TILT) + w * math.sin(TILT), w * math.cos(TILT) - v * math.sin(TILT)
    places = torch.stack(
        [u * math.cos(TURN) + away * math.sin(TURN), away * math.cos(TURN) - u * math.sin(TURN), up], -1
    )
    field = torch.nn.functional.grid_sample(
        torch.nn.functional.pad(x.float(), (1,) * 6, value=-1.0),
        places[None].expand(len(x), -1, -1, -1, -1) * x.shape[-1] / (x.shape[-1] + 2), align_corners=False,
    )[:, 0]  # fmt: skip
    hit = field > 0
    first = hit.float().argmax(1)
    there = hit.any(1)
    slope = torch.stack(torch.gradient(field, dim=(3, 2, 1)), 1)  # right, down, away from the viewer
    normal = -torch.take_along_dim(slope, first[:, None, None].expand(-1, 3, -1, -1, -1), 2)[:, :, 0]
    normal = normal / normal.norm(dim=1, keepdim=True).clamp_min(1e-6)
    light = torch.tensor(LIGHT)
    right, up, near = light / light.norm()
    shade = normal[:, 0] * right - normal[:, 1] * up - normal[:, 2] * near
    return torch.where(there, 0.25 + 0.6 * shade.clamp(0, 1), 1.0)


def shares(x: Tensor) -> Tensor:
    """How far each block of 3x3x3 voxels is filled, ``[N, blocks]``."""
    return torch.nn.functional.avg_pool3d(x.clamp(-1, 1), 3).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("runs/shapes"), help="run folder of the teacher")
    parser.add_argument("--student", type=Path, default=Path("runs/shapes-mdt-dist"), help="run folder of the student")
    parser.add_argument("--teacher-budget", default="1200steps")
    parser.add_argument("--budget", default="350steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--n", type=int, default=320, help="samples of each model (default 320)")
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data, held_out = load_data("shapes3d"), load_data("shapes3d", "test")
    common = {"batch": chosen.batch, "precision": "fp32"}
    if not (chosen.teacher / "model").is_dir():
        torch.manual_seed(0)
        net = UNet3d(data.shape, (24, 48), 1, 64, data.classes)
        fresh = NetworkDenoiser(net, FlowMatching(), Velocity(), data.shape, data.classes)
        api.distill(fresh, FlowMatchingTraining(), data, chosen.teacher_budget, folder=chosen.teacher, **common)
    teacher = api.load(str(chosen.teacher))
    if not (chosen.student / "model").is_dir():
        api.distill(teacher, MDTDist(), "shapes3d", chosen.budget, folder=chosen.student, **common)
    student = api.load(str(chosen.student))

    real, labels = data.read(slice(None)), torch.arange(chosen.n) % data.classes
    rows = {"held-out solids": held_out.read(slice(None))}
    asked = {"held-out solids": held_out.labels}
    for calls in (1, 2):
        rows[f"student, {calls} call{'s' * (calls > 1)}"] = student.sample(chosen.n, labels, steps=calls)
    for calls in (1, 2, 4, 16):
        name = f"teacher, {calls} call{'s' * (calls > 1)}"
        rows[name] = sample(teacher, chosen.n, cond=labels, solver="ddim", steps=calls, grid="uniform")
    print("| | Fréchet | overlap with the nearest solid | of the class asked for |\n|---|---:|---:|---:|")
    for name, x in rows.items():
        found = nearest(x, asked.get(name, labels), real, data.labels)
        distance = frechet_distance(shares(x), shares(real))
        print(f"| {name} | {distance:.2f} | {found.overlap:.2f} | {found.accuracy:.2f} |", flush=True)
    if chosen.picture:
        shown = {name: rows[name] for name in rows if name != "held-out solids"}
        draw({name: render(x[: data.classes]) for name, x in shown.items()}, data.class_names, chosen.picture)


def draw(pictures: dict[str, Tensor], names: tuple[str, ...], path: Path) -> None:
    """One row a model, one column a class."""
    figure, axes = pyplot.subplots(len(pictures), 1, figsize=(6.4, 0.86 * len(pictures)), layout="constrained")
    for ax, (name, row) in zip(axes, pictures.items(), strict=True):
        ax.imshow(torch.cat([*row], 1), cmap="gray", vmin=0, vmax=1)
        ax.set_xticks([row.shape[2] * (k + 0.5) for k in range(len(names))], names, fontsize=7)
        ax.tick_params(length=0, labelbottom=ax is axes[-1])
        ax.set_yticks([])
        ax.set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
        for side in ax.spines.values():
            side.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
