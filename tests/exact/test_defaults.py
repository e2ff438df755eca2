"""The published defaults: every hyper-parameter of every method against the value that its authors printed or ran.

A default that differs is declared by the class: a method names the field in backticks among its paper's deviations, and
what is named there does differ; a solver says it in its docstring.  ``OPEN``, three dots, stands where nothing was
published.  A method that has no row here has one in its own test, as ``PUBLISHED``; a method, a field or a solver
without any fails.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cv_dd import recovering

from fewstep import grids
from fewstep.classifiers import NetworkClassifier
from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.discrete.chains import Masked
from fewstep.discrete.denoisers import NetworkDiscreteDenoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.language_models import NetworkLanguageModel
from fewstep.methods import RECIPES, recipe_class
from fewstep.methods.flow_maps.rectified_flow import STRAIGHT
from fewstep.methods.method import Batch, Progress, alone
from fewstep.methods.parts import times
from fewstep.methods.parts.distances import Distance, pseudo_huber
from fewstep.methods.parts.times import LogNormal, Own, TimeLaw, Uniform
from fewstep.methods.start import Start
from fewstep.networks import MLP, UNet
from fewstep.networks.causal import GRULanguageModel
from fewstep.networks.classifiers import ConvNet, MLPClassifier
from fewstep.networks.transformer import Transformer
from fewstep.predictions import EDMPrediction, TrigPrediction
from fewstep.randomness import Rng
from fewstep.runs.stages import stages_of
from fewstep.sampling.coefficients import DATA, NOISE
from fewstep.sampling.dpm_ot import optimal_transport
from fewstep.sampling.named import ALL_SOLVERS
from fewstep.sampling.self_conditioning import SelfConditioning
from fewstep.sampling.solvers.dpm_solver_v3 import DPMSolverV3
from fewstep.sampling.solvers.stochastic import Churn
from fewstep.schedules import EDM, TrigFlow, VPCosine, VPLinear

#: No published value.
OPEN: Any = ...

#: What an optimizer has unless its authors say otherwise; AdamW without weight decay is Adam.
ADAM = {
    "kind": "adam", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clip": None, "warmup": 0,
    "decay": "constant",
}  # fmt: skip
TEN_MILLION_IMAGES = 10_000_000 // 512  # the warm-up of EDM and of consistency models on CIFAR-10, in updates of 512

# DMD and DMD2: tianweiy/DMD2, main/edm/train_edm.py (AdamW, 500 steps of warm-up, max_grad_norm) and experiments/
MATCHING = {**ADAM, "kind": "adamw", "weight_decay": 0.01, "clip": 10.0, "warmup": 500}
# SiD (run_sid.sh, sid_train.py) and Diff-Instruct (README, di_train.py): Adam for both networks
ONE_STEP = {**ADAM, "betas": (0.0, 0.999)}
# MDLM (configs/config.yaml, lr_scheduler/constant_warmup) and SEDD (configs/config.yaml) have the same
TOKENS = {**ADAM, "clip": 1.0, "warmup": 2500}
# configs/cifar10_ve_cd.py and cifar10_ve_ct_adaptive.py of openai/consistency_models_cifar10
CONSISTENCY = {**ADAM, "kind": "radam", "warmup": TEN_MILLION_IMAGES}
# paper, table of ImageNet-64 hyper-parameters (EDM2's decay from t_ref = 35k); how it warms up is not said
CONTINUOUS = {**ADAM, "betas": (0.9, 0.99), "eps": 1e-11, "decay": "inverse-sqrt:35000", "warmup": OPEN}
# google-research/diffusion_distillation, config/cifar_distill.py
HALVING = {**ADAM, "clip": 1.0, "decay": "linear"}
# gnobitab/RectifiedFlow, configs/default_cifar10_configs.py and rectified_flow/cifar10_rf_gaussian_reflow_train.py
REFLOW = {**ADAM, "clip": 1.0, "warmup": 5000}
# Align Your Flow: c and r_max of the paper; the gaps (64 x 64) and the range of weights of a re-implementation
ALIGNED = {
    "c": 0.1, "r_max": 0.99, "gap_mean": -0.6, "gap_std": 1.6, "guidance_low": 1.0, "guidance_high": 3.0,
    **dict.fromkeys(("lr", "tangent_warmup", "guidance", "gan_share", "gan_lr", "gamma", "steps"), OPEN),
    "optimizer": dict.fromkeys(ADAM, OPEN),
}  # fmt: skip
UNPUBLISHED = dict.fromkeys(ADAM, OPEN)

#: The published values of the fields of every class, and of the optimizer of all its groups.
PUBLISHED: dict[str, dict[str, Any]] = {
    # EDM, table 1 and NVlabs/edm train.py (CIFAR-10); no guidance, so no dropped labels; warm-up of 10 million images
    "denoising": {
        "lr": 1e-3, "label_dropout": 0.0, "clip": None, "warmup": TEN_MILLION_IMAGES, "noise_mean": -1.2,
        "noise_std": 1.2,
        "optimizer": {**ADAM, "warmup": TEN_MILLION_IMAGES},
    },
    # Flow Matching, appendix E and table 3 (CIFAR-10): polynomial decay after 45k updates of warm-up
    "flow-matching": {
        "lr": 5e-4, "label_dropout": 0.0, "clip": None, "warmup": 45_000,
        "optimizer": {**ADAM, "warmup": 45_000, "decay": "polynomial"},
    },
    "discrete-denoising": {"lr": 3e-4, "label_dropout": 0.0, "clip": 1.0, "warmup": 2500, "optimizer": TOKENS},
    "score-entropy": {"lr": 3e-4, "label_dropout": 0.0, "clip": 1.0, "warmup": 2500, "optimizer": TOKENS},
    # section 4 and appendix; google-research/pix2seq, configs/config_diffusion_base.py and _cifar10.py
    "analog-bits": {
        "lr": 1e-4, "self_conditioning": 0.5, "bound": 1.0, "label_dropout": 0.0, "warmup": 10_000,
        "optimizer": {**ADAM, "clip": 1.0, "warmup": 10_000},
    },
    # only the abstract and reviews are known
    "lowdiff": {
        **dict.fromkeys(
            ("lr", "label_dropout", "clip", "warmup", "noise_mean", "noise_std", "resolutions", "shares", "weights",
             "shift", "augmentation_max", "picture_dropout"), OPEN),
        "optimizer": UNPUBLISHED,
    },
    # section 4 (zeta of 5 %, the score at the start of the interval); feiyangfu/LSD sampler.py (8 steps of 256)
    "lsd": {
        "lr": OPEN, "steps": 8, "teacher_steps": 256, "stepper": "euler", "target": "interval", "teacher_start": "own",
        "share": 0.05,
        "optimizer": UNPUBLISHED,
    },
    "lsd-plus": {
        "lr": OPEN, "steps": 8, "teacher_steps": 256, "stepper": "euler", "target": "interval", "teacher_start": "own",
        "share": 0.05, "step_target": "literal",
        "optimizer": UNPUBLISHED,
    },
    # launch.sh (CD with LPIPS) and configs/cifar10_ve_cd.py: 18 scales, sigma_data, the target a copy of the student
    "cm": {
        "lr": 4e-4, "distance": "lpips", "sigma_data": 0.5, "steps": OPEN, "grid_times": 18, "mu": 0.0,
        "guidance": 1.0,
        "optimizer": CONSISTENCY,
    },
    # launch.sh (CT with adaptive schedules): start_scales, end_scales, start_ema
    "cm-training": {
        "lr": 4e-4, "distance": "lpips", "sigma_data": 0.5, "steps": OPEN, "s0": 2, "s1": 150, "mu0": 0.9,
        "optimizer": CONSISTENCY,
    },
    # table 1 and appendix (CIFAR-10)
    "ict": {
        "lr": 1e-4, "sigma_data": 0.5, "s0": 10, "s1": 1280, "noise_mean": -1.1, "noise_std": 2.0,
        "second_level": 0.821, "beta2": 0.999,
        "optimizer": {**ADAM, "kind": "radam"},
    },
    # tables of ImageNet-64 S: 10k of 400k iterations are the tangent's warm-up
    "scm": {
        "lr": 1e-4, "sigma_data": 0.5, "c": 0.1, "tangent_warmup": 10_000 / 400_000, "noise_mean": -1.0,
        "noise_std": 1.6, "steps": OPEN, "guidance": 1.0,
        "optimizer": CONTINUOUS,
    },
    "scm-training": {
        "lr": 1e-4, "sigma_data": 0.5, "c": 0.1, "tangent_warmup": 10_000 / 400_000, "noise_mean": -1.0,
        "noise_std": 1.6, "steps": OPEN,
        "optimizer": CONTINUOUS,
    },
    # section 3.3 (lambda_reg), appendix (500k pairs of Stable Diffusion); devrimcavusoglu/dmd train.py (CIFAR-10, pairs
    # by 18 Heun steps); matching on pairs too is for text only
    "dmd": {
        "regression_weight": 0.25, "distance": "lpips", "pairs": 500_000, "ode_steps": 18, "match_pairs": False,
        "guidance": 1.0, "lr": 5e-5, "critic_lr": 5e-5, "clip": 10.0, "warmup": 500,
        "optimizer": MATCHING,
    },
    # experiments/imagenet/imagenet_gan_classifier_genloss3e-3_diffusion1000_lr2e-6_scratch.sh
    "dmd2": {
        "steps": 1, "critic_steps": 5, "first_level": 1.0, "gan_weight": 3e-3, "discriminator_weight": 1e-2,
        "discriminator": "critic", "r1": 0.0, "energy_weight": 0.0,
        "guidance": 1.0, "lr": 2e-6, "critic_lr": 2e-6, "clip": 10.0, "warmup": 500,
        "optimizer": MATCHING,
    },
    # README (--lr, --glr, --init_sigma) and training/di_loss.py (P_mean, P_std)
    "diff-instruct": {
        "init_sigma": 1.0, "guidance": 1.0, "lr": 1e-5, "critic_lr": 1e-5, "noise_mean": -1.2, "noise_std": 1.2,
        "optimizer": ONE_STEP,
    },
    # run_sid.sh (CIFAR-10): --alpha, --tmax of 1000, --init_sigma, --lr, --glr
    "sid": {
        "init_sigma": 2.5, "guidance": 1.0, "lr": 1e-5, "critic_lr": 1e-5, "alpha": 1.2, "level_max": 0.8,
        "optimizer": ONE_STEP,
    },
    # maple-research-lab/SIM inference.py (init_sigma), the paper's choice of distance; else SiD's, whose code it names
    "sim": {
        "init_sigma": 2.5, "guidance": 1.0, "lr": 1e-5, "critic_lr": 1e-5, "distance": "pseudo-huber", "c": OPEN,
        "level_max": 0.8,
        "optimizer": ONE_STEP,
    },
    # the configs above; a million pairs by adaptive RK45, which has no number of steps
    "reflow": {"pairs": 1_000_000, "ode_steps": OPEN, "guidance": 1.0, "lr": 2e-4, "optimizer": REFLOW},
    # model cards and paper: 1.6M triplets by 25 steps under guidance 6, one reflow, its pairs under 1.5; LPIPS at last
    "instaflow": {
        "reflows": 1, "steps": 1, "pairs": 1_600_000, "ode_steps": 25, "guidance": 6.0, "distance": "lpips",
        "lr": OPEN, "reflow_guidance": 1.5,
        "optimizer": UNPUBLISHED,
    },
    # section 4.3, appendix A and Gsunshine/meanflow (configs); distillation is not the paper's, guidance is the model's
    "mean-flow": {
        "lr": 1e-4, "power": 1.0, "c": 0.01, "equal": 0.75, "time_mean": -0.4, "time_std": 1.0, "steps": OPEN,
        "guidance": OPEN,
        "optimizer": {**ADAM, "betas": (0.9, 0.95)},
    },
    "mean-flow-training": {
        "lr": 1e-4, "power": 1.0, "c": 0.01, "equal": 0.75, "time_mean": -0.4, "time_std": 1.0, "steps": OPEN,
        **dict.fromkeys(("guidance", "kappa", "guided_from", "guided_to"), OPEN), "label_dropout": 0.1,
        "optimizer": {**ADAM, "betas": (0.9, 0.95)},
    },
    "ayf": ALIGNED, "ayf-lmd": ALIGNED,
    "pd": {"start": 8192, "end": 1, "lr": 5e-5, "weighting": "snr-trunc", "guidance": 1.0, "optimizer": HALVING},
    "pd-halving": {"steps": OPEN, "lr": 5e-5, "weighting": "snr-trunc", "guidance": 1.0, "optimizer": HALVING},
}  # fmt: skip

#: The laws of the times that one iteration draws, in order; none where a method draws from a grid of its own.
LAWS: dict[str, list[TimeLaw]] = {
    "denoising": [LogNormal(-1.0, 1.4)],  # its fields, see above
    "lowdiff": [LogNormal(-1.0 - math.log(2), 1.4)],  # at half of the resolution, which is drawn first here
    "flow-matching": [Uniform(0.0, 1.0)],
    "analog-bits": [Uniform(0.0, 1.0)],
    "scm": [LogNormal(-1.0, 1.6)],
    "scm-training": [LogNormal(-1.0, 1.6)],
    # dmd: matching at 2 % to 98 % of the 1000 levels, the critic at all of them
    "dmd": [Own(0.02, 0.98), Own(0.0, 1.0)],
    # and the diffusion GAN at all of them (diffusion_gan_max_timestep 1000), in the student's update and the critic's
    "dmd2": [Own(0.02, 0.98), Own(0.0, 1.0), Own(0.0, 1.0), Own(0.0, 1.0)],
    # the critic first, with EDM's law
    "diff-instruct": [LogNormal(-1.2, 1.2), LogNormal(-1.2, 1.2)],
    "sid": [LogNormal(-1.2, 1.2), Own(0.0, 0.8)],
    "sim": [LogNormal(-1.2, 1.2), Own(0.0, 0.8)],
}

SHAPE, LENGTH, CLASSES = (1, 4, 4), 6, 3


def start_of(name: str) -> Start:
    """A small teacher of the kind that the method works on, and its data."""
    torch.manual_seed(0)
    if name == "cv-dd":  # whose later stages start from a pool
        return recovering()
    if recipe_class(name).task == "classification":
        x = torch.randint(0, 256, (120, 1, 16, 16), dtype=torch.uint8)
        shape = (1, 16, 16)
        net = ConvNet(shape, CLASSES, width=4) if name == "dq" else MLPClassifier(shape, CLASSES, width=8)
        return Start(NetworkClassifier(net, (1, 16, 16), CLASSES), Dataset("pictures", x, torch.arange(120) % CLASSES))
    if name in ("discrete-denoising", "score-entropy", "lsd", "lsd-plus"):
        net = Transformer(LENGTH, 5, 6, width=8, blocks=1, heads=2)
        return Start(NetworkDiscreteDenoiser(net, Masked(5), LENGTH), Dataset("words", torch.ones(8, LENGTH).long()))
    if recipe_class(name).task == "language":
        models = [NetworkLanguageModel(GRULanguageModel(5, 32, width=8), 5, 32) for _ in range(3)]
        given = dict(zip(recipe_class(name).roles, models, strict=False))
        return Start(models[2], Dataset("words", torch.ones(8, 32).long()), given=given)
    net = UNet(SHAPE, (8, 8), 1, 16, CLASSES) if name == "lowdiff" else MLP(SHAPE, 64, 1, CLASSES)
    prediction = EDMPrediction(sigma_data=0.7) if name == "retime" else TrigPrediction(sigma_data=0.7)
    teacher = NetworkDenoiser(net, TrigFlow(sigma_data=0.7), prediction, SHAPE, CLASSES)
    return Start(teacher, Dataset("points", torch.randn(8, *SHAPE), torch.arange(8) % CLASSES))


def differences(ours: Any, published: dict[str, Any]) -> set[str]:
    """The names of what is not as published; a distance is known by its name."""
    values = {k: getattr(ours, k) for k in published}
    told = {k: str(v) if isinstance(v, Distance) else v for k, v in values.items()}
    return {k for k, v in published.items() if v is not OPEN and told[k] != v}


def published_of(name: str) -> dict[str, Any]:
    """The row of a method, here or in its own test."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    module = RECIPES[name].partition(":")[0].rpartition(".")[2]
    rows: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name(f"test_{module}.py")))["PUBLISHED"]
    return rows.get(name, rows)  # of several methods in one file by name


@pytest.mark.parametrize("name", RECIPES)
def test_a_default_is_the_published_one_or_declared(name: str) -> None:
    cls = recipe_class(name)
    published = dict(published_of(name))
    optimizer = published.pop("optimizer")
    assert {field.name for field in dataclasses.fields(cls)} == set(published)
    different = differences(cls(), published)
    for stage in stages_of(cls()):
        for group in stage.method.networks(start_of(name)).groups.values():
            different |= differences(group, optimizer)
    assert set(re.findall(r"`(\w+)`", " ".join(cls.paper.deviations))) & {*published, *ADAM} == different


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ("pd", "instaflow")])
def test_the_times_follow_the_published_laws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, start, drawn = recipe_class(name), start_of(name), []
    laws = {law for law in vars(times).values() if inspect.isclass(law) and issubclass(law, TimeLaw)} - {TimeLaw}
    assert laws > {LogNormal, Uniform, Own}
    for law in laws:
        real = law.draw

        def spy(self: TimeLaw, *given: Any, real: Any = real) -> torch.Tensor:
            drawn.append(self)
            return real(self, *given)

        monkeypatch.setattr(law, "draw", spy)
    method: Any = cls()
    batch = start.data.rows(slice(None))
    pairs = Batch(torch.randn(8, *SHAPE), batch.cond, Rng(1), {"noise": torch.randn(8, *SHAPE)})
    rows = Batch(batch.x, batch.cond, Rng(0), {"noise": pairs.x}, of={"pairs": pairs})
    for update in alone(method.updates(method.networks(start), rows, Progress())):
        assert update.groups
    assert drawn == LAWS.get(name, [])


# --- solvers -----------------------------------------------------------------------------------------------------

# LuChengTHU/dpm-solver, dpm_solver_pytorch.py: lower_order_final, which acts in runs of fewer than ten steps
MULTISTEP = {"form": DATA, "eta": 0.0, "lower_order_final": True}
ABM_FIELDS = ("p", "c", "corrector", "form", "eta", "guidance", "lower_order_final")
#: The official code's defaults by solver class; ABM is ours, and of DualFast no code is public.
SOLVER_DEFAULTS: dict[str, dict[str, Any]] = {
    # NVlabs/edm generate.py: no churn
    "RungeKutta": {"churn": Churn(0.0, 0.0, math.inf, 1.0)},
    "DDIM": {"eta": 0.0, "lower_order_final": OPEN},
    "DDPMLarge": {"eta": 1.0, "lower_order_final": OPEN},
    # the same: algorithm_type dpmsolver++, order 2, solver_type dpmsolver; "fast" has order 3
    "Single": {"p": 2, "form": DATA, "kind": "dpmsolver"},
    "Fast": {"p": 3, "form": DATA, "kind": "dpmsolver"},
    "DPMSolverPP2M": MULTISTEP,
    "DPMSolverPP2MTaylor": MULTISTEP,
    "DPMSolverPP3M": MULTISTEP,
    "DPMSolverPP3MPublished": MULTISTEP,
    # its adaptive solver: atol, rtol, h_init and theta
    "AdaptiveDPMSolver": {"p": 3, "form": NOISE, "rtol": 0.05, "atol": 0.0078, "first": 0.05, "safety": 0.9},
    # crowsonkb/k-diffusion, sampling.py
    "Ancestral": {"form": DATA, "eta": 1.0},
    "DPMSolverPPSDE": {"form": DATA, "eta": 1.0},
    # wl-zhao/UniPC, uni_pc.py
    "UniPC": {"p": 2, "variant": "bh1", "corrector": True, "lower_order_final": True, "form": DATA},
    # qsh-zh/deis, th_deis/multistep.py and demo (ab_order 3); iPNDM has four outputs
    "TAB": {"degree": 3, "lower_order_final": False},
    "RhoAB": {"degree": 3, "lower_order_final": False},
    "IPNDM": {"p": 4, "lower_order_final": False},
    "ABM": dict.fromkeys(ABM_FIELDS, OPEN),
    "DualFast": dict.fromkeys(("base", "anchor", "weight", "ramp"), OPEN),
}  # fmt: skip


def undeclared(cls: type, published: dict[str, Any]) -> set[str]:
    """Fields of a class that are not as published, and of which no sentence of its docstring, or of a solver that it is
    a kind of, says what the paper or the official code has."""
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    docs = " ".join(" ".join((base.__doc__ or "").split()) for base in cls.__mro__[:-1])
    said = [sentence for sentence in docs.split(". ") if "paper" in sentence or "official" in sentence]
    return {
        name
        for name, value in published.items()
        if value is not OPEN
        and defaults[name] != value
        and not any(f"``{name}``" in sentence and str(value) in sentence for sentence in said)
    }


@pytest.mark.parametrize(
    "cls", list(dict.fromkeys(type(make()) for make in ALL_SOLVERS.values())), ids=lambda cls: cls.__name__
)
def test_a_solver_has_its_codes_defaults(cls: type) -> None:
    published = SOLVER_DEFAULTS[cls.__name__]
    own = {f.name for f in dataclasses.fields(cls)} - {"tableau", "frame"}  # which say what solver it is
    assert own == set(published)
    assert not undeclared(cls, published)


def test_what_needs_statistics_or_targets_has_its_codes_defaults() -> None:
    """DPM-Solver-v3 as in the sample.sh of guided-diffusion and Stable Diffusion; DPM-OT's Adam as in ot_util.py, whose
    rates are absolute; Bit Diffusion's feedback (b_scale, no momentum)."""
    v3 = {"p": 2, "corrector": "on", "pseudo_predictor": False, "pseudo_corrector": True, "lower_order_final": True}
    assert {f.name for f in dataclasses.fields(DPMSolverV3)} == {"statistics", *v3}
    assert not undeclared(DPMSolverV3, v3)
    adam = {
        "rate": 0.1, "tolerance": 8e-4, "iterations": 10_000, "draws": 10, "patience": 50, "doublings": 3, "beta1": 0.9,
        "beta2": 0.999,
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(optimal_transport.Adam)} == set(adam)
    assert not undeclared(optimal_transport.Adam, adam)
    assert SelfConditioning() == SelfConditioning(bound=1.0, momentum=0.0)


def test_schedules_grids_and_constants_are_the_papers() -> None:
    """EDM's levels and rho; the linear and cosine schedules; rectified flow's first time; iCT's pseudo-Huber; sCM's
    latest and second time; DDPM's and Stable Diffusion's betas; the largest churn."""
    assert (EDM().t_min, EDM().t_max) == (0.002, 80.0)
    assert inspect.signature(grids.karras).parameters["rho"].default == 7.0
    assert (VPLinear().beta_min, VPLinear().beta_max) == (0.1, 20.0)
    assert VPCosine().log_snr_max == 20 / 2  # of log(alpha^2 / sigma^2)
    assert STRAIGHT.t_min == 1e-3
    assert TrigFlow().sigma_data == 0.5
    c = 0.00054 * math.sqrt(64)
    a = torch.full((1, 64), c / 8, dtype=torch.float64)  # of norm c
    assert float(pseudo_huber(a, torch.zeros_like(a))) == pytest.approx(c * (math.sqrt(2) - 1), rel=1e-12)
    scm = recipe_class("scm")(sigma_data=0.5)
    teacher = NetworkDenoiser(MLP((2,), 8, 1), EDM(), TrigPrediction(), (2,))
    plans = scm.student(scm.networks(Start(teacher))).plans  # type: ignore[attr-defined]
    assert plans[2].times == pytest.approx((math.atan(80 / 0.5), 1.1))
    for schedule, first, last in ((DiscreteVP.linear(), 1e-4, 0.02), (DiscreteVP.scaled_linear(), 0.00085, 0.012)):
        alphas = schedule.alpha(torch.tensor([0.0, 998.0, 999.0], dtype=torch.float64))
        assert 1 - float(alphas[0] ** 2) == pytest.approx(first, rel=1e-9)
        assert 1 - float((alphas[2] / alphas[1]) ** 2) == pytest.approx(last, rel=1e-9)
