"""CONTRIBUTING.md: what it tells people to write is written here, and works."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep.methods.flow_maps
from fewstep import catalogue
from fewstep.cli import main
from fewstep.data import Dataset
from fewstep.denoisers import NetworkDenoiser
from fewstep.methods import RECIPES
from fewstep.methods.start import Start
from fewstep.networks import MLP
from fewstep.predictions import TrigPrediction
from fewstep.runs.course import run_recipe
from fewstep.sampling.coefficients import Levels, vandermonde
from fewstep.sampling.solvers.dpm_solver import DPMSolverPP3M
from fewstep.schedules import Schedule, TrigFlow, VPLinear
from fewstep.training.budget import Budget
from fewstep.training.trainer import Settings

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
MODULE = "fewstep.methods.flow_maps.pair_regression"


def block(title: str) -> str:
    """The code block of the page whose first line is ``# title``."""
    found = re.findall(rf"```python\n# {re.escape(title)}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) == 1, f"{len(found)} code blocks titled {title}"
    return found[0]


def defined(title: str, **names: Any) -> dict[str, Any]:
    """What a block defines, given the names that its file imports."""
    space = {"__name__": __name__, "dataclass": dataclass, "Tensor": Tensor, "torch": torch, **names}
    exec(compile(block(title), f"{PAGE.name}: {title}", "exec", dont_inherit=True), space)
    return space


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's method as a module of the package, with its line in RECIPES."""
    (tmp_path / "pair_regression.py").write_text(block("src/fewstep/methods/flow_maps/pair_regression.py"))
    package = fewstep.methods.flow_maps
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    for name, place in eval("{" + block("RECIPES") + "}").items():
        monkeypatch.setitem(RECIPES, name, place)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE]
    del package.pair_regression  # type: ignore[attr-defined]


def test_schedule() -> None:
    """The derivatives are those of the coefficients, the power is 1, and ``time_at`` inverts ``log_snr``."""
    schedule = defined("schedule", Schedule=Schedule)["LinearSigma"]()
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64).requires_grad_()
    for value, slope in ((schedule.alpha(t), schedule.d_alpha(t)), (schedule.sigma(t), schedule.d_sigma(t))):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), t)[0], slope, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(t)), t, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_solver_is_exact_for_cubics(power: int) -> None:
    """For ``D = lambda^k`` on an uneven grid the row is ``alpha_t int exp(lambda - lambda_t) lambda^k``."""
    names = {"DPMSolverPP3M": DPMSolverPP3M, "Levels": Levels}
    solver = defined("solver", **names, vandermonde=vandermonde)["DPMSolverPP4M"]()
    levels = Levels.of(VPLinear(), torch.tensor([1.0, 0.8, 0.62, 0.4, 0.3], dtype=torch.float64))
    s, t = levels.log_snr[3], levels.log_snr[4]

    def primitive(u: float) -> float:
        """Of ``exp(u) u^k``."""
        return math.exp(u) * (1, u - 1, u**2 - 2 * u + 2, u**3 - 3 * u**2 + 6 * u - 6)[power]

    row = solver.row(levels, 3, 4)
    assert row.a == pytest.approx(levels.sigma[4] / levels.sigma[3], rel=1e-14)
    said = sum(c * levels.log_snr[3 - j] ** power for j, c in enumerate(row.c))
    exact = levels.alpha[4] * math.exp(-t) * (primitive(t) - primitive(s))
    assert said == pytest.approx(exact, rel=1e-11)


def test_the_test_of_the_page(installed: Any) -> None:
    """The page's own test passes, and there is one."""
    space = defined("tests/exact/test_pair_regression.py")
    tests = [value for name, value in space.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_its_test_holds_the_published_values(installed: Any) -> None:
    """One for every hyper-parameter, and for the optimizer: ``test_defaults`` reads them."""
    published = defined("tests/exact/test_pair_regression.py")["PUBLISHED"]
    assert set(published) == {*(field.name for field in fields(installed.PairRegression)), "optimizer"}


def test_method_trains(installed: Any, tmp_path: Path) -> None:
    """A short run on a small teacher brings the student nearer to the pairs than the teacher's own single call."""
    torch.manual_seed(0)
    net = MLP((2,), 32, 1, 3)
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    schedule = TrigFlow(t_max=1.56, sigma_data=0.7)
    teacher = NetworkDenoiser(net, schedule, TrigPrediction(sigma_data=0.7), (2,), 3).eval()
    method = installed.PairRegression(pairs=256, ode_steps=8, lr=3e-3)
    data = Dataset("points", torch.zeros(12, 2), torch.arange(12) % 3)
    settings = Settings(budget=Budget(60), batch=64, precision="fp32")
    student = run_recipe(method, teacher, data, settings, tmp_path / "run", show=False).model
    start = Start(teacher, data)
    pairs = method.sources(start)["data"]

    def error(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((model(pairs.columns["noise"], pairs.labels) - pairs.x).square().mean())

    before = error(method.student(method.networks(start)))
    assert error(student) < before / 2


def test_method_has_its_command(installed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The line in RECIPES is enough for a command with typed flags and help from the fields."""
    assert main(["distill", "pair-regression", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--ode-steps" in told and "made once before training" in told and "arXiv 2101.02388" in told
    assert main(["distill", "pair-regression", "--teacher", "digits", "--ode-steps", "few"]) == 2
    assert "--ode-steps" in capsys.readouterr().err


def test_its_file_and_its_line_are_enough_for_the_catalogue(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row, the line of the README's table and the sections of its page come from the class."""
    monkeypatch.syspath_prepend(str(PAGE.parent / "tools"))
    sections = importlib.import_module("page_sections")
    rows = {row.key: row for row in catalogue.systems.__wrapped__()}
    row = rows["pair-regression"]
    assert (row.state, row.arxiv, row.exact_test) == ("works", "2101.02388", "tests/exact/test_pair_regression.py")
    assert row.docs_page == "docs/systems/pair-regression.md"
    page = "<!-- deviations: pair-regression -->\n<!-- end -->\n<!-- healthy: pair-regression -->\n<!-- end -->\n"
    assert "Heun steps" in sections.fill(page) and "`student/loss`: falls" in sections.fill(page)


def test_a_method_touches_four_files() -> None:
    """Its own, its test, its page and one line: the page shows the first two and the line, and asks for no other."""
    told = PAGE.read_text()
    section = told[told.index("## A method in one file") : told.index("## A kind of model")]
    files = set(re.findall(r"(?:src/fewstep|tests|docs/systems)/[\w/<>-]+\.(?:py|md)", section))
    shared = {"tests/exact/test_every_method.py", "src/fewstep/methods/__init__.py"}
    assert files - shared == {
        "src/fewstep/methods/flow_maps/pair_regression.py", "tests/exact/test_pair_regression.py",
        "docs/systems/<name>.md",
    }  # fmt: skip
