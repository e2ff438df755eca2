"""FastGen's training, an iteration at a time, from a checkout of NVlabs/FastGen: its networks, models, callbacks and
trainer as they are, with the configuration that is written out here.

What FastGen imports and its training step does not use may be missing: empty modules stand for it.
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

CLASSES, RATE, CLIP, GAN = 10, 1e-4, 10.0, 1e-3
#: The updates of the critic for each of the student's.
CRITIC_UPDATES = {"dmd2": 4, "f-distill": 4, "ladd": 1}
#: Side of the pictures, their channels, those of the network, and its factors on them at each resolution.
SIZES = {"large": (32, 3, 16, [1, 2, 2]), "small": (8, 1, 16, [1])}


class Absent(ModuleType):
    """Stands for a module that FastGen imports and that is not installed: any name in it is an empty class."""

    run = None  # "no run" of wandb, as without its callback

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


#: Uploads, videos and run pages: what FastGen imports on the way to its trainer, which has no use for it here.
UNUSED = ("boto3", "botocore", "botocore.exceptions", "imageio", "imageio.v3", "wandb")


def put_on_path(folder: Path) -> None:
    """Make ``import fastgen`` that of a checkout; its configuration files, which import every network, are left out:
    what they would set is in :func:`configuration`."""
    if not (folder / "fastgen" / "trainer.py").is_file():
        raise SystemExit(f"--fastgen {folder}: no checkout of NVlabs/FastGen (fastgen/trainer.py is not there)")
    sys.path.insert(0, str(folder.absolute()))
    import diffusers  # noqa: F401  which looks for what is installed before anything stands for it

    for name in UNUSED:
        if PathFinder.find_spec(name.partition(".")[0]) is None:
            sys.modules[name] = Absent(name)
    sys.modules["fastgen.configs.config"] = Absent("fastgen.configs.config")
    import fastgen.utils.logging_utils as logging_utils

    logging_utils.logger.remove()


@dataclass(frozen=True)
class Setup:
    """What the two share: the network and the discriminator of FastGen, the data, and the sizes of a run."""

    method: str
    network: nn.Module
    heads: nn.Module
    network_config: Any
    heads_config: Any
    x: Tensor
    labels: Tensor
    batch: int

    @property
    def updates(self) -> int:
        return CRITIC_UPDATES[self.method]


def set_up(method: str, size: str, batch: int) -> Setup:
    """Random weights, those of the layers that start near zero too (gradients of 1e-10 would be slow numbers)."""
    from fastgen.networks.discriminators import Discriminator_EDM
    from fastgen.networks.EDM.network import EDMPrecond
    from fastgen.utils import LazyCall, instantiate

    side, colours, width, factors = SIZES[size]
    network_config = LazyCall(EDMPrecond)(
        img_resolution=side, img_channels=colours, label_dim=CLASSES, model_type="SongUNet", model_channels=width,
        channel_mult=factors, dropout=0.0,
    )  # fmt: skip
    levels = [side >> k for k in range(len(factors))]
    heads_config = LazyCall(Discriminator_EDM)(
        feature_indices=None, all_res=levels, in_channels=width * factors[-1]
    )  # fmt: skip
    torch.manual_seed(0)
    network, heads = instantiate(network_config), instantiate(heads_config)
    for p in network.parameters():
        if p.abs().max() < 1e-3:
            nn.init.normal_(p, std=0.02)
    x = 0.5 * torch.randn(256, colours, side, side)
    return Setup(method, network, heads, network_config, heads_config, x, torch.arange(256) % CLASSES, batch)


def configuration(setup: Setup) -> SimpleNamespace:
    """What FastGen's configuration of the method on EDM sets, in float32 on the CPU, with fused optimizers."""
    import attrs
    from fastgen.callbacks.ema import EMACallback
    from fastgen.callbacks.grad_clip import GradClipCallback
    from fastgen.configs.opt import BaseOptimizerConfig, BaseSchedulerConfig
    from fastgen.utils import LazyCall

    optimizer, course = copy.deepcopy(BaseOptimizerConfig), copy.deepcopy(BaseSchedulerConfig)
    optimizer.fused, optimizer.lr, course.warm_up_steps = True, RATE, [0]
    law = {
        "time_dist_type": "polynomial", "train_p_mean": -1.1, "train_p_std": 2.0, "shift": 5.0, "min_t": 0.002,
        "max_t": 80.0, "t_list": None, "log_t_df": 0.01,
    }  # fmt: skip
    ratio = SimpleNamespace(
        f_div="js", ratio_lower=0.1, ratio_upper=20.0, ratio_normalization=True, bin_num=10, ratio_ema_rate=0.0
    )
    model = SimpleNamespace(
        device="cpu", precision="float32", precision_amp=None, precision_amp_infer=None, precision_amp_enc=None,
        precision_fsdp=None, input_shape=list(setup.x.shape[1:]), use_ema=True, net=setup.network_config, teacher=None,
        pretrained_model_path="", pretrained_student_net_path="", load_student_weights=True, fsdp_meta_init=False,
        add_teacher_to_fsdp_dict=True, guidance_scale=None, skip_layers=None, enable_preprocessors=False,
        grad_scaler_enabled=False, grad_scaler_init_scale=65536.0, grad_scaler_growth_interval=2000,
        student_sample_steps=1, student_sample_type="sde", student_update_freq=setup.updates + 1,
        sample_t_cfg=attrs.make_class("Law", {name: attrs.field(default=value) for name, value in law.items()})(),
        net_optimizer=optimizer, net_scheduler=course, fake_score_optimizer=optimizer, fake_score_scheduler=course,
        discriminator=setup.heads_config, discriminator_optimizer=optimizer, discriminator_scheduler=course,
        gan_loss_weight_gen=GAN, gan_use_same_t_noise=False, fake_score_pred_type=None, gan_r1_reg_weight=0.0,
        gan_r1_reg_alpha=0.1, f_distill=ratio,
    )  # fmt: skip
    callbacks = {
        "grad_clip": LazyCall(GradClipCallback)(grad_norm=CLIP, model_key="net"),
        "ema": LazyCall(EMACallback)(type="constant", beta=0.9999, ema_name="ema"),
    }
    trainer = SimpleNamespace(
        callbacks=callbacks, fsdp=False, ddp=False, grad_accum_rounds=1, logging_iter=1000
    )  # fmt: skip
    return SimpleNamespace(model=model, trainer=trainer, dataloader_train=SimpleNamespace(batch_size=setup.batch))


class FastGen:
    """FastGen's model and trainer, an iteration at a time."""

    def __init__(self, setup: Setup) -> None:
        from fastgen.callbacks.callback import CallbackDict
        from fastgen.methods import DMD2Model, FdistillModel, LADDModel
        from fastgen.trainer import Trainer

        kinds = {"dmd2": DMD2Model, "f-distill": FdistillModel, "ladd": LADDModel}
        config = configuration(setup)
        self.setup, self.rounds, self.past = setup, 0, 0
        self.trainer = Trainer.__new__(Trainer)
        self.trainer.config = config
        self.trainer.callbacks = CallbackDict(config, self.trainer)
        self.model = kinds[setup.method](config.model)
        for role, net in self.model.named_children():
            if role != "discriminator":
                net.load_state_dict(setup.network.state_dict(), strict=False)
        self.model.discriminator.load_state_dict(setup.heads.state_dict())
        self.model.on_train_begin()
        self.trainer.callbacks.on_model_init_end(self.model)
        self.model.init_optimizers()

    def step(self) -> list[tuple[str, float]]:
        """The next iteration, a student's first: what was updated, and the milliseconds that it took."""
        setup = self.setup
        place = self.past % (setup.updates + 1)
        rows = torch.arange(self.past * setup.batch, (self.past + 1) * setup.batch) % len(setup.x)
        self.past += 1
        iteration = setup.updates + self.past  # a multiple of student_update_freq for a student's
        begun = time.process_time()
        condition = one_hot(setup.labels[rows], CLASSES).float()
        data = {"real": setup.x[rows], "condition": condition, "neg_condition": torch.zeros_like(condition)}
        callbacks, model = self.trainer.callbacks, self.model
        callbacks.on_training_step_begin(model, iteration=iteration)
        data = self.trainer.preprocess_data(model, data)
        callbacks.on_training_accum_step_begin(model, data, iteration=iteration, accum_iter=0)
        losses, outputs = self.trainer.train_step(model, model, data, iteration, 0)
        callbacks.on_training_step_end(
            model=model, data_batch=data, output_batch=outputs, loss_dict=losses, iteration=iteration
        )
        return [("critic" if place else "student", 1e3 * (time.process_time() - begun))]
