"""Two time scales: a ring of eight by DMD2 without its GAN, with one critic update for each of the student's and with
five.

    python benchmarks/two_time_scales.py

Teacher and scores of the data are exact; student and critic begin as a small model of the ring.  A row says how often
the student and the critic have moved and how far 4,000 samples are from data (energy distance; data from data has about
0.001): means over seeds.  Under a minute of one core.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.exact import ring
from fewstep.methods.matching.dmd2 import DMD2
from fewstep.methods.start import Start
from fewstep.methods.teachers.denoising import Denoising
from fewstep.metrics import energy_distance
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.randomness import Rng
from fewstep.schedules import TrigFlow
from fewstep.training.budget import Budget
from fewstep.training.profiles import Power
from fewstep.training.settings import Settings
from fewstep.training.trainer import train

SCHEDULE = TrigFlow(sigma_data=1.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--updates", type=int, default=1500, help="of the critic, in the longer runs (default 1500)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    world = ring(SCHEDULE, sd=0.2)
    x, held_out = world.sample(4096, Rng(1)).float(), world.sample(4000, Rng(2)).float()
    data = Dataset("ring", x)

    def settings(steps: int, seed: int) -> Settings:
        return Settings(Budget(steps), 128, seed=seed, precision="fp32", averages=(Power(0.1),))

    print("| critic updates for each of the student's | student | critic | energy distance |\n|---:|---:|---:|---:|")
    for every, share in ((1, 0.2), (1, 1.0), (5, 1.0)):
        found = []
        steps = round(chosen.updates * share)
        for seed in chosen.seeds:
            torch.manual_seed(seed)
            fresh = NetworkDenoiser(MLP((2,), 32, 1), SCHEDULE, TrigPrediction(sigma_data=1.4), (2,))
            begun = train(Denoising(lr=4e-3), Start(fresh, data), settings(200, seed), None, show=False).model
            method = DMD2(gan_weight=0.0, critic_steps=every, lr=2e-3, critic_lr=4e-3)
            start = Start(world, data, seed, given={"student": begun, "critic": begun})
            student = train(method, start, settings(steps, seed), None, show=False).model
            found.append(energy_distance(student.sample(4000, seed=7), held_out))
        print(f"| {every} | {-(-steps // every)} | {steps} | {statistics.fmean(found):.4f} |", flush=True)


if __name__ == "__main__":
    main()
