"""What ``fs.sample`` is given: every argument, and every parameter of every named solver and grid, is taken where it
makes sense and answered with one line of ours where it does not; nothing is taken in silence.
"""

import inspect
import math
import re

import numpy as np
import pytest
import torch

from fewstep.denoisers import Denoiser
from fewstep.discrete_vp import DiscreteVP
from fewstep.exact import three_modes
from fewstep.grids import GRIDS, karras
from fewstep.guidance import Guided
from fewstep.sampling import DDIM, SOLVERS, Churn, RungeKutta, sample
from fewstep.sampling.named import CHURN_FIELDS
from fewstep.schedules import EDM
from fewstep.values import declared

WORLD = three_modes(labels=[0, 1, 2])
GRID = karras(WORLD.schedule, 6)
NOISE = torch.randn(3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WRONG = {
    "nan": math.nan, "inf": math.inf, "zero": 0, "minus one": -1, "true": True, "2.5": 2.5, "a word": "x",
    "1e300": 1e300, "10**30": 10**30, "nothing": [], "a dict": {}, "an object": object(), "1j": 1j,
    "a tensor": torch.tensor(3),
}  # fmt: skip
#: Which of these are right for an argument.
RIGHT = {
    "n": set(), "solver": set(), "steps": set(), "grid": set(), "noise": set(), "seeds": set(), "generator": set(),
    "seed": {"zero", "minus one", "10**30"},
    "guidance": {"zero", "minus one", "2.5", "a tensor"},
    "threshold": set(), "denoise": {"true"}, "one_path": {"true"}, "self_conditioning": set(), "progress": set(),
}  # fmt: skip


def mistake(call):
    """The answer to a wrong call: a ValueError or TypeError that this package raised on purpose, on one line."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    entry = caught.traceback[-1]
    assert "fewstep" in str(entry.path) and "raise " in str(entry.statement), f"{caught.value} is not ours"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("argument", RIGHT)
def test_every_argument(argument, value):
    """A value of another kind or out of range is named; a right one gives finite samples."""
    options = {"n": 2, "steps": 3, argument: WRONG[value]}
    if value in RIGHT[argument]:
        assert bool(sample(WORLD, **options).isfinite().all())
    else:
        assert argument in mistake(lambda: sample(WORLD, **options))


@pytest.mark.parametrize("value", ["2.5", "true", "a word", "a tensor", "nothing", "nan", "1j"])
def test_labels(value):
    """Labels are whole numbers, one a sample."""
    assert "cond" in mistake(lambda: sample(WORLD, 2, cond=WRONG[value]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": NOISE.long()}, r"noise of type torch.int64"),
        ({"noise": NOISE.bool()}, r"noise of type torch.bool"),
        ({"noise": NOISE + 1j}, r"noise of type torch.complex128"),
        ({"noise": NOISE / 0}, "noise holds numbers that are not finite"),
        ({"noise": [[1], [2], [3]]}, "noise of type torch.int64"),
        ({"noise": [[1.0], [2.0, 3.0], [4.0]]}, "noise must be a tensor, an array or a list of numbers"),
        ({"guidance": [1.0, 2.0]}, r"guidance of shape \[2\] for 3 samples"),
        ({"guidance": [1.0, math.nan, 2.0]}, "guidance="),
        ({"cond": torch.tensor([0.0, 1.0, 2.0])}, "labels are whole numbers, got torch.float32"),
        ({"cond": torch.tensor([True, False, True])}, "labels are whole numbers, got torch.bool"),
        ({"cond": torch.tensor([[0], [1], [2]])}, r"cond of shape \[3, 1\]"),
        ({"cond": [0, 1, 7]}, r"labels must lie in 0 \.\. 2"),
        ({"steps": 2.5}, r"steps=2\.5 must be a whole number"),
        ({"solver": None}, "solver=None must be a name"),
        ({"solver": DDIM}, "must be a name such as 'unipc', or a Solver"),
        ({"solver": "unipc:"}, "'' has no value"),
        ({"solver": "unipc:p=1,p=2"}, "'p' is given twice"),
        ({"solver": "dualfast:base=ddim"}, "'base' is not a parameter; it has anchor, weight, ramp"),
        ({"solver": "heun:churn=nan"}, "churn: 'nan' is not a finite number"),
        ({"solver": "heun:churn_low=2,churn_high=1"}, r"Churn: low=2.0 must lie in \[0, 1\]"),
        ({"solver": "dpm2:churn=4"}, "'churn' is not a parameter"),
        ({"grid": "karras:rho=0"}, "rho=0.0 must lie in"),
        ({"grid": "karras:rho=-7"}, "rho=-7.0 must lie in"),
        ({"grid": "balanced:kappa=-1"}, "kappa=-1.0 must lie in"),
        ({"grid": "karras:end=3"}, "end=3.0 must be 0 or a time in"),
        ({"grid": [1.0, 0.5, 0.5, 0.1]}, "times 1 and 2 are 0.5 and 0.5"),
        ({"grid": [1.0, None]}, "a time grid must be a tensor, an array or a list of numbers"),
        ({"grid": GRID + 1j}, "a vector of real numbers"),
        ({"grid": lambda schedule, steps: karras(schedule, 4), "steps": 6}, "gave 5 times for steps=6, which need 7"),
        ({"seed": 1, "seeds": [1, 2, 3]}, "seed=1 stands beside seeds"),
        ({"generator": torch.Generator(), "seeds": [1, 2, 3]}, "generator stands beside"),
        ({"generator": [torch.Generator(), 2, 3]}, "must be a torch.Generator, or one a sample, got int"),
        ({"seeds": [1, 2.5, 3]}, r"seeds\[1\]=2.5 must be a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_mistakes(options, said):
    """The argument, its value and what would be right."""
    assert re.search(said, mistake(lambda: sample(WORLD, 3, **options)))


def test_lists_and_arrays_stand_for_tensors():
    """Where it is clear what they mean; equal but for where arrays lie in memory, which vectorised sums notice."""
    weights = torch.tensor([1.0, 2.0, 3.0])
    expected = sample(WORLD, 3, grid=GRID, cond=torch.tensor([2, 1, 0]), noise=NOISE, guidance=weights)
    for kind in (list, np.array):
        options = {"grid": GRID.tolist(), "cond": [2, 1, 0], "noise": NOISE.tolist(), "guidance": weights.tolist()}
        made = sample(WORLD, 3, **{name: kind(value) for name, value in options.items()})
        assert float((made - expected).abs().max()) < 1e-12
    made = sample(WORLD, np.int64(3), steps=np.int32(4), seeds=np.arange(3))
    assert float((made - sample(WORLD, 3, steps=4, seeds=range(3))).abs().max()) < 1e-12


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e30, True, "2"])
def test_guidance_anywhere(scale):
    """A denoiser under guidance refuses the weight itself, wherever it is made."""
    assert "guidance" in mistake(lambda: Guided(WORLD, scale))


WORDS = ["nan", "inf", "-inf", "0", "-1", "true", "2.5", "x", "none", "1e300", "1000000000000", "1", ""]


#: One name for every class of solvers: the parameters are those of the class.
CLASSES = {type(make()): name for name, make in SOLVERS.items()}


@pytest.mark.parametrize("name", CLASSES.values())
def test_every_parameter_of_every_solver(name):
    """A word behind a solver's name either gives finite samples or one line."""
    made = SOLVERS[name]()
    keys = [*declared(type(made)), *(CHURN_FIELDS if isinstance(made, RungeKutta) else ())]
    for key in keys:
        for word in WORDS:
            taken_or_refused(sample, three_modes(), 2, solver=f"{name}:{key}={word}", steps=4)


@pytest.mark.parametrize("name", GRIDS)
def test_every_parameter_of_every_grid(name):
    """The same for grids, and for their functions called with wrong values."""
    for schedule in (EDM(), DiscreteVP.linear()):
        for key in list(inspect.signature(GRIDS[name]).parameters)[1:]:
            for word in WORDS:
                taken_or_refused(sample, three_modes(schedule), 2, solver="ddim", grid=f"{name}:{key}={word}", steps=4)
            for value in WRONG.values():
                taken_or_refused(GRIDS[name], schedule, **{"steps": 4, key: value})


def taken_or_refused(function, *arguments, **options):
    try:
        assert bool(function(*arguments, **options).isfinite().all())
    except (ValueError, TypeError):
        mistake(lambda: function(*arguments, **options))


@pytest.mark.parametrize("value", ["nan", "true", "a word", "nothing", "1j"])
@pytest.mark.parametrize("field", ["amount", "low", "high", "inflation"])
def test_churn(field, value):
    """Built by hand, it is checked as by name."""
    assert field in mistake(lambda: Churn(**{field: WRONG[value]}))


class Wrong(Denoiser):
    """A denoiser that gives back something else than a prediction for its state."""

    def __init__(self, what):
        super().__init__(EDM(), (2, 3))
        self.what = what

    def forward(self, x, t, cond=None):
        return self.what(x)


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x[:1], lambda x: x.mean(1, keepdim=True), lambda x: x.sum(), lambda x: x.transpose(1, 2),
        lambda x: (x,), lambda x: None, lambda x: x.long(), lambda x: x + 1j,
    ],
)  # fmt: skip
def test_a_denoiser_that_returns_something_else(what):
    """What broadcasts to the state (one prediction for all, a mean over channels) is no prediction."""
    assert mistake(lambda: sample(Wrong(what), 4)).startswith("the denoiser gave")
