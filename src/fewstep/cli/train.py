"""Train a teacher, a diffusion or flow model, or a few-step model that needs no teacher, from scratch.

  fewstep train NAME --data DATA [--network unet --channels 40,80] [--budget 4000steps] [--out FOLDER]
  fewstep train NAME --network mlp --help          the flags of another network, schedule or prediction
  fewstep train --recipe runs/x/recipe.json        a recorded run again

The same command in the same folder resumes a run that was stopped.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fewstep.cli import methods
from fewstep.cli.errors import UserError, choose
from fewstep.cli.flags import Parameter, given, of_constructor, of_dataclass
from fewstep.cli.settings import add_run_arguments, refuse_beside_recipe, settings_given, word_after

if TYPE_CHECKING:
    from fewstep.data import Samples
    from fewstep.denoisers import NetworkDenoiser
    from fewstep.predictions import Prediction
    from fewstep.schedules import Schedule

METHODS = (
    "denoising", "flow-matching", "cm-training", "ict", "ctm-training", "scm-training", "mean-flow-training",
    "shortcut", "analog-bits", "lowdiff",
)  # fmt: skip
SCHEDULES = ("TrigFlow", "FlowMatching", "EDM", "VPLinear", "VPCosine")
#: What the data and the method decide about a network.
FROM_DATA = ("shape", "classes", "extras", "beside")
#: A network of more tensors of weights is a slip of the hand, and would take hours to build.
MOST_TENSORS = 2000
DEFAULTS = {"method": "denoising", "network": "unet", "schedule": "TrigFlow", "prediction": "trig"}
#: What a method's paper trains where that is something else.
FLOW = {"schedule": "FlowMatching", "prediction": "velocity"}
OWN_DEFAULTS = dict.fromkeys(("flow-matching", "mean-flow-training", "shortcut"), FLOW)
#: Settings that mean nothing to a fresh network, which is no base of low-rank weights.
OF_STUDENTS = ("lora_rank", "lora_alpha", "lora_targets")
#: What can be the name of a folder.
FOLDER = r"[^/\\\x00-\x1f\x7f]+"


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    from fewstep.networks import NETWORKS
    from fewstep.predictions import PREDICTIONS

    parser.usage = "fewstep train NAME --data DATA [flags]"
    parser.add_argument("name", metavar="NAME", nargs="?", help="what to call the model; its folder is runs/NAME")
    parser.add_argument("--unconditional", action="store_true", help="leave the labels of the data out")
    choices = {"method": METHODS, "network": NETWORKS, "schedule": SCHEDULES, "prediction": PREDICTIONS}
    picked: dict[str, str] = {}
    for what, known in choices.items():
        default = (DEFAULTS | OWN_DEFAULTS.get(picked.get("method", ""), {}))[what]
        text = f"{', '.join(known)} (default {default})"
        parser.add_argument(f"--{what}", metavar="NAME", default=default, help=text)
        picked[what] = choose(what, word_after(f"--{what}", words, default), known)
    added: set[str] = set()  # a name that model and method share (sigma_data) is one flag, which sets both
    for title, parameters in {
        f"the network, {picked['network']}, and its noise schedule": model_parameters(**picked),
        f"hyper-parameters of {picked['method']}": methods.parameters(picked["method"]),
    }.items():
        group = parser.add_argument_group(title)
        for parameter in parameters:
            if parameter.name not in added:
                parameter.add_to(group)
            added.add(parameter.name)
    add_run_arguments(parser, without=OF_STUDENTS)


def model_parameters(network: str, schedule: str, prediction: str, **_: str) -> list[Parameter]:
    """What shapes a fresh model; a name that schedule and prediction share (``sigma_data``) sets both."""
    from fewstep.hub.native import SCHEDULES
    from fewstep.networks import NETWORKS
    from fewstep.predictions import PREDICTIONS

    found = [
        *of_constructor(NETWORKS[network], FROM_DATA),
        *of_dataclass(SCHEDULES[schedule]),
        *of_dataclass(PREDICTIONS[prediction]),
    ]
    return list({parameter.name: parameter for parameter in found}.values())


def fresh_model(chosen: argparse.Namespace, data: Samples) -> dict[str, Any]:
    """The description of an untrained model for the data, as :func:`fewstep.hub.native.build` takes it."""
    from fewstep.denoisers import NetworkDenoiser
    from fewstep.hub import native
    from fewstep.hub.weights import no_larger_than
    from fewstep.networks import NETWORKS
    from fewstep.predictions import PREDICTIONS

    picked = {what: getattr(chosen, what) for what in DEFAULTS}
    values = given(model_parameters(**picked), chosen)
    classes = None if chosen.unconditional else data.classes

    def build(cls: Any, parameters: list[Parameter], **more: Any) -> Any:
        return cls(**more, **{p.name: values[p.name] for p in parameters if p.name in values})

    network, prediction = NETWORKS[chosen.network], PREDICTIONS[chosen.prediction]
    schedule = native.SCHEDULES[chosen.schedule]
    made, predicted = build(schedule, of_dataclass(schedule)), build(prediction, of_dataclass(prediction))
    refuse_pure_noise(chosen, made, predicted)
    with no_larger_than(MOST_TENSORS):
        net = build(network, of_constructor(network, FROM_DATA), shape=data.shape, classes=classes)
    return native.describe(NetworkDenoiser(net, made, predicted, data.shape, classes))


def refuse_pure_noise(chosen: argparse.Namespace, schedule: Schedule, prediction: Prediction) -> None:
    """:class:`UserError` for a prediction from which the data cannot be told where sampling starts."""
    import torch

    latest = torch.tensor(schedule.t_max, dtype=torch.float64)
    if not all(bool(c.isfinite()) for c in prediction.coefficients(schedule, latest)):
        raise UserError(
            f"--prediction {chosen.prediction}: {chosen.schedule} ends in pure noise at t = {schedule.t_max:g}, where "
            "it does not tell the data: choose velocity, or an earlier --t-max"
        )


def initialised(description: dict[str, Any], seed: int) -> NetworkDenoiser:
    """The described model with weights drawn from the seed."""
    import torch

    from fewstep.hub import native
    from fewstep.hub.weights import no_larger_than
    from fewstep.randomness import derive_seed

    with torch.random.fork_rng(devices=[]), no_larger_than(MOST_TENSORS):
        torch.manual_seed(derive_seed(seed, "initial weights"))
        return native.build(description)


def run(chosen: argparse.Namespace) -> None:
    from fewstep.cli import models, plan, runs
    from fewstep.runs.record import data_source

    if chosen.recipe is not None:
        shape = model_parameters(**{what: getattr(chosen, what) for what in DEFAULTS})
        refuse_beside_recipe(chosen, [*shape, *methods.parameters(chosen.method)])
        record = runs.reopened(chosen.recipe, "train", chosen)
        recipe = methods.build(choose("method", record.method, METHODS), record.hyper_parameters)
        data = models.training_samples(record.data["source"])
        runs.check_source("data set", record.data["source"], record.data, data_source(record.data["source"], data))
    else:
        if chosen.name is None:
            raise UserError("NAME is missing: what to call the model, as in 'fewstep train teacher --data digits'")
        if not re.fullmatch(FOLDER, chosen.name) or not chosen.name.strip(" ."):
            raise UserError(f"NAME '{chosen.name}' is not the name of a folder in runs/; --out takes a path")
        if chosen.data is None:
            raise UserError("--data is missing: digits, fashion, shapes3d, or the path of a data set")
        recipe = methods.build(chosen.method, given(methods.parameters(chosen.method), chosen))
        data = models.training_samples(chosen.data)
        start, source = fresh_model(chosen, data), data_source(chosen.data, data)
        record = runs.begin("train", recipe, start, source, settings_given(chosen))
    settings = runs.settings_of(record.settings, "settings")
    model = initialised(record.start, settings.seed)
    if chosen.dry_run:
        plan.show(recipe, model, data, settings)
        return
    out = runs.folder_for(chosen, chosen.name or "teacher")
    runs.tell(runs.execute(record, recipe, model, data, out, not chosen.quiet), out)
