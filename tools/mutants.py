"""Can the tests fail?  Random one-token mutants of the mathematics, each run through the tests that reach it.

    python tools/mutants.py [--count 200] [--seed 0] [--only FILE] [--resume]

A mutant (``mutant_tokens.py``) is written into a copy of the repository, never into this one.  Which tests reach which
function is measured once for each file of tests, and again when that file changes.  A mutant meets the tests that reach
its function, the cheapest first, until one is red; one that ``--seconds`` of tests do not notice has survived.  What
survives is printed at the end, but for what the table of ``docs/mutants.md`` explains.  All of it is kept in
``.mutants/``: ``--resume`` goes on where a run of the same seed was interrupted, and tries its survivors again, but for
those explained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # read by PyTorch and by processes of tests
sys.dont_write_bytecode = True  # a mutant may have the size and the second of the file before it

import pytest  # noqa: E402
from mutant_tokens import Mutant, mutants_of  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".mutants"
COPIED = ("src", "tests", "tools", "docs", "benchmarks", "*.md", "*.toml", "*.yml", "Makefile")
PACKAGE = "src/fewstep/"
TESTS = (
    "exact/test_*.py", "referee/test_samplers_*.py", "referee/test_metrics*.py", "referee/test_tangents.py",
    "referee/test_student_samplers.py", "faults/test_bad_input.py",
)  # fmt: skip
NO_JUDGE = {"test_distributed.py"}  # starts processes and waits for them: red on a busy machine
MATHEMATICS = (
    "methods/**/*.py", "sampling/**/*.py", "exact/*.py", "discrete/*.py", "metrics/*.py", "networks/*.py",
    "schedules.py", "discrete_vp.py", "grids.py", "predictions.py", "denoisers.py", "guidance.py", "flow_maps.py",
    "tangents.py", "generators.py", "codecs.py", "conditions.py", "training/averages.py", "training/ema.py",
    "training/optimizers.py", "training/groups.py", "training/nonfinite.py", "training/budget.py",
)  # fmt: skip
NAME = ("file", "function", "was", "is", "number")
SLOW = 2.0  # processor seconds of a test that is not waited for


class Reach:
    """A pytest plugin: the functions of the package that each test enters, and its processor seconds."""

    def __init__(self, package: str, seconds: float) -> None:
        self.package, self.seconds, self.entered, self.shared = package, seconds, set[str](), set[str]()
        self.tests: dict[str, dict[str, Any]] = {}
        self.passed, self.end = True, math.inf
        sys.settrace(self.enter)

    def enter(self, frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self.package):
            if time.process_time() > self.end:
                self.end = math.inf
                raise TimeoutError(f"takes more than {SLOW} s: no judge of mutants")
            self.entered.add(f"{code.co_filename[len(self.package) :]}:{code.co_qualname.replace('.<locals>', '')}")

    def pytest_runtestloop(self) -> None:
        self.shared |= self.entered  # while the file was imported

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before, self.entered = self.entered, set()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.shared |= self.entered
            self.entered |= before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.entered, self.passed, start = set(), True, time.process_time()
        self.end = start + SLOW
        sys.settrace(self.enter)
        result = yield
        self.end = math.inf
        if self.passed:
            self.tests[item.nodeid] = {"seconds": time.process_time() - start, "functions": sorted(self.entered)}
        if time.process_time() > self.seconds:
            item.session.shouldstop = "the rest of this file is too slow to judge mutants"
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed &= report.passed


class Cheapest:
    """A pytest plugin: runs the given tests in their order, and says which was red."""

    def __init__(self, tests: list[str], red: Path) -> None:
        self.order, self.red = {test: at for at, test in enumerate(tests)}, red

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        wanted = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(wanted, key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.red.write_text(report.nodeid)


def in_child(work: Callable[[], int], scratch: Path, seconds: float) -> int | None:
    """Exit code of the work in a process of its own that is in the copy; None where it took longer than ``seconds`` of
    processor time, or ten times that by the clock."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(scratch)
        log = os.open(scratch / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        os.environ["PYTHONPATH"] = str(scratch / "src")
        sys.path.insert(0, str(scratch / "src"))
        code = 70
        try:
            code = work()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 10 * seconds + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and whatever it started
    if not done[0]:
        os.waitpid(child, 0)
    return os.WEXITSTATUS(done[1]) if done[0] and os.WIFEXITED(done[1]) else None


def copy_to(scratch: Path) -> None:
    """The repository's own files, without what was built or trained in it."""
    scratch.mkdir()
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, scratch / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(path, scratch)


def measure(scratch: Path) -> dict[str, dict[str, Any]]:
    """test -> its seconds and the functions that it reaches, of all files of tests."""
    tests: dict[str, dict[str, Any]] = {}
    for path in sorted(path for pattern in TESTS for path in (scratch / "tests").glob(pattern)):
        if path.name in NO_JUDGE:
            continue
        file = path.relative_to(scratch).as_posix()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        kept = KEPT / "reach" / f"{path.parent.name}-{path.stem}-{digest}.json"
        if not kept.exists():
            print(f"measuring {file}", flush=True)
            kept.parent.mkdir(parents=True, exist_ok=True)

            def trace(file: str = file, kept: Path = kept) -> int:
                reach = Reach(f"{scratch / PACKAGE}/", 30)
                pytest.main(["-q", "-p", "no:cacheprovider", file], plugins=[reach])
                kept.write_text(json.dumps({"shared": sorted(reach.shared), "tests": reach.tests}))
                return 0

            if in_child(trace, scratch, 600) != 0:
                kept.write_text(json.dumps({"shared": [], "tests": {}}))
                print(f"{file}: left out, it takes more than 600 s", flush=True)
        found = json.loads(kept.read_text())
        shared = set(found["shared"])
        tests |= {
            name: test | {"functions": set(test["functions"]), "shared": shared}
            for name, test in found["tests"].items()
        }
    return tests


def reaching(mutant: Mutant, tests: dict[str, dict[str, Any]], seconds: float) -> list[str]:
    """The tests that enter the mutant's function, or its class or module where it stands in none, the cheapest first;
    then those for which it was entered while their file was imported."""
    place = f"{mutant.file.removeprefix(PACKAGE)}:"
    name, found = mutant.function, list[tuple[int, float, str]]()
    while True:
        whole, below = place + name, f"{place}{name}." if name else place
        for test, facts in tests.items():
            for order, known in enumerate((facts["functions"], facts["shared"])):
                if whole in known or any(function.startswith(below) for function in known):
                    found.append((order, facts["seconds"], test))
                    break
        if found or not name:
            break
        name = name.rpartition(".")[0]
    chosen: list[str] = []
    for _, cost, test in sorted(found):
        if (seconds := seconds - cost) < 0 and chosen:
            break
        chosen.append(test)
    return chosen


def judge(mutant: Mutant, scratch: Path, tests: list[str], seconds: float) -> dict[str, Any]:
    """By which test the mutant was killed (empty: it survived), how many were run, and how long that took."""
    target, red = scratch / mutant.file, scratch / "red.txt"
    source = target.read_text()
    red.unlink(missing_ok=True)

    def work() -> int:
        for some in (tests[:8], tests[8:40], tests[40:]):  # importing many files of tests costs more than most mutants
            files = sorted({test.partition("::")[0] for test in some})
            options = ["-x", "-q", "-p", "no:cacheprovider", *files]
            if some and pytest.main(options, plugins=[Cheapest(some, red)]) != 0:
                return 1
        return 0

    start = time.monotonic()
    try:
        target.write_text(mutant.of(source))
        code = in_child(work, scratch, seconds) if tests else 0
    finally:
        target.write_text(source)
    by = red.read_text() if red.exists() else "no end in time" if code is None else "import" if code else ""
    return {"by": by, "tests": len(tests), "seconds": round(time.monotonic() - start, 1)}


def names(mutants: list[Mutant], source: str) -> list[dict[str, str]]:
    """What each mutant of a file is, without line numbers: its file and function, the line as it was and as it is, and
    which of several alike it is."""
    found, seen = list[dict[str, str]](), Counter[str]()
    for mutant in mutants:
        was, now = (text.splitlines()[mutant.line - 1].strip() for text in (source, mutant.of(source)))
        seen[f"{mutant.function} {was} {now}"] += 1
        number = str(seen[f"{mutant.function} {was} {now}"])
        values = (mutant.file.removeprefix(PACKAGE), mutant.function, was, now, number)
        found.append(dict(zip(NAME, values, strict=True)))
    return found


def draw(root: Path, only: str | None, count: int, seed: int) -> list[tuple[Mutant, dict[str, str]]]:
    """Mutants with their names, in an order that depends on the seed and on the name of each only: what an edit leaves
    as it was is drawn as before."""
    ranked = []
    for file in sorted({path.relative_to(root).as_posix() for of in MATHEMATICS for path in (root / PACKAGE).glob(of)}):
        if only and file != only:
            continue
        source = (root / file).read_text()
        found = mutants_of(file, source)
        ranked += [(rank(seed, name), mutant, name) for mutant, name in zip(found, names(found, source), strict=True)]
    return [(mutant, name) for _, mutant, name in sorted(ranked, key=lambda one: one[0])[:count]]


def rank(seed: int, name: dict[str, str]) -> str:
    """Where a mutant of this name stands in the order of a seed."""
    return hashlib.sha256(json.dumps([seed, *(name[key] for key in NAME)]).encode()).hexdigest()


def explained() -> set[tuple[str, str]]:
    """File and changed line of the mutants that the table of ``docs/mutants.md`` explains."""
    rows = re.findall(r"^\| `(\S+)` \| `(.+?)` \| `(.+?)` \|", (ROOT / "docs" / "mutants.md").read_text(), re.MULTILINE)
    return {(file, now.replace("\\|", "|")) for file, _, now in rows}


def report(results: list[dict[str, Any]]) -> int:
    """Prints the survivors without an explanation, and how many there are of each; 1 where there is one without."""
    known = explained()
    alive = [one for one in results if not one["by"]]
    left = [one for one in alive if (one["file"], one["is"]) not in known]
    for one in left:
        print(
            f"{one['file']}, {one['function'] or 'module'}  ({one['tests']} tests)\n    {one['was']}\n    {one['is']}"
        )
    share = f"{len(alive)} survived ({100 * len(alive) / max(len(results), 1):.1f} %)"
    print(f"{len(results)} mutants: {len(results) - len(alive)} killed, {share}, {len(left)} of them unexplained")
    return 1 if left else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", metavar="FILE", help="of this file of the package only")
    parser.add_argument("--seconds", type=float, default=60.0, help="processor seconds of tests that a mutant meets")
    parser.add_argument("--resume", action="store_true", help="keep what was killed before, and what is explained")
    args = parser.parse_args()
    KEPT.mkdir(exist_ok=True)
    kept = KEPT / f"results-{args.seed}{'-' + Path(args.only).stem if args.only else ''}.jsonl"
    old = [json.loads(line) for line in kept.read_text().splitlines()] if args.resume and kept.exists() else []
    known = explained()
    settled = {rank(args.seed, one): one for one in old if one["by"] or (one["file"], one["is"]) in known}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "copy"
        copy_to(scratch)  # from here on, edits of the repository change nothing
        drawn = draw(scratch, args.only, args.count, args.seed)
        if not drawn:
            parser.error(f"--only {args.only}: no file of the mathematics, such as {PACKAGE}grids.py")
        import hypothesis, scipy.stats, torch  # noqa: E401, F401, I001  (once, for all children)

        tests, results = measure(scratch), []
        with kept.open("w") as record:
            record.writelines(json.dumps(one) + "\n" for one in settled.values())
            for mutant, name in drawn:
                one = settled.get(rank(args.seed, name))
                if one is None:
                    some = reaching(mutant, tests, args.seconds)
                    limit = 15 + 3 * sum(tests[test]["seconds"] for test in some)
                    one = name | judge(mutant, scratch, some, limit)
                    what = f"{one['by'] or 'SURVIVED'}  {mutant.file}:{mutant.line}"
                    print(f"{one['seconds']:6.1f} s  {what}", flush=True)
                    record.write(json.dumps(one) + "\n")
                    record.flush()
                results.append(one)
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
