"""What holds for every test: one thread a process, the garbage collector out of the way, and a budget of time.

The suite runs a process a core, and sums in PyTorch depend on how many threads share them: with one thread, what a test
computes here and in a process it starts can be compared bit for bit.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Generator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is imported, here and in every process a test starts

#: Seconds of processor time that a file of tests should stay under; a system's tests share one file or two.
BUDGET = 10.0
#: The files that take longest, in seconds of processor time.  Where several processes share the files, these are begun
#: first, the longest before all, so that none works alone at the end.
LONGEST = {
    "test_hub_export.py": 50, "test_solver_order.py": 33, "test_cli_runs.py": 45, "test_cli_products.py": 33,
    "test_distributed.py": 25, "test_worlds.py": 28, "test_every_method.py": 25, "test_bad_input.py": 26,
    "test_solver_families.py": 20, "test_rollout.py": 20, "test_engine.py": 10, "test_dpm_ot.py": 20,
    "test_dpm_solver_v3.py": 19, "test_trained_students.py": 18, "test_as_scheduler.py": 16, "test_feed.py": 15,
    "test_scheduler_life.py": 16, "test_trainer.py": 15, "test_velocity_form.py": 12, "test_adaptive.py": 12,
    "test_learned.py": 12, "test_hub_lora.py": 12, "test_hostile_folders.py": 12, "test_kill_resume.py": 40,
}  # fmt: skip
#: So many of the files above it are listed at the end of a run.
LISTED = 10

# Libraries are made of millions of objects that live for good, and looking through them took a third of the time that
# collecting the tests takes, and 0.6 s of every full collection after it.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: -LONGEST.get(item.path.name, 0))


def pytest_collection_finish() -> None:
    """What the imports made is left out of every collection from here on."""
    gc.collect()
    gc.freeze()
    gc.enable()


class ProcessorTime:
    """Sums up the processor time of every file of tests, that of the processes it started and waited for included.

    The clock on the wall says little on a machine that others use.  What a fixture makes for several tests is counted
    where it was made.
    """

    def __init__(self) -> None:
        self.last = spent()
        self.files: Counter[str] = Counter()

    def pytest_collection_finish(self) -> None:
        self.last = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Every report (of a set-up, a test, a tear-down) carries the time since the one before it."""
        report = yield
        before, self.last = self.last, spent()
        report.processor_time = self.last - before
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Where several processes run tests, reports arrive here from all of them."""
        self.files[report.nodeid.partition("::")[0]] += report.processor_time

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        above = [(file, seconds) for file, seconds in self.files.most_common(LISTED) if seconds > BUDGET]
        total = sum(self.files.values())
        terminalreporter.write_line(
            f"{total:.0f} s of processor time; files above {BUDGET:g} s: {len(above) or 'none'}"
        )
        for file, seconds in above:
            terminalreporter.write_line(f"  {seconds:5.1f} s  {file}")


def spent() -> float:
    """The processor time of this process and of those it waited for, in seconds."""
    return sum(os.times()[:4])


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ProcessorTime(), "processor time")
