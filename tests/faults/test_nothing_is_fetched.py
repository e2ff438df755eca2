"""No host is asked, nothing is unpickled: every command with its sockets blocked, and every call that could."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
from hostile import pixel_pipeline, sockets_blocked, text_pipeline

from fewstep import demo
from fewstep.cli import COMMANDS, main

QUICK = "--budget 2steps --batch 8 --precision fp32 --quiet"
#: Every command at work, in this order in one folder.
AT_WORK = (
    f"train t --data digits --network mlp --width 16 --blocks 1 --out small {QUICK}",
    f"distill cm --teacher digits --out run {QUICK}",
    f"condense pca --data digits --k 1 --per-class 1 --network mlp-classifier --width 8 --out few {QUICK}",
    "traces addition --digits 1 --problems 8 --out sums.safetensors",
    "evaluate few --networks mlp-classifier --seeds 1 --train-steps 1",
    "report few --out few.html",
    "sample digits --n 2 --steps 2 --out a.npz",
    "sample run --n 2 --out b.npz",
    "inspect run --n 2 --out b.png",
    "sample pixels --n 2 --steps 2 --out c.npz",
    "sample text --n 1 --steps 2 --prompt a --guidance 2 --out d.npz",
    "tune-steps digits --calls 2 --n 2 --reference 20 --solvers ddim --grids uniform --out tuned.json",
    "sample digits --settings tuned.json --n 2 --out e.npz",
    "statistics digits --samples 16 --grid 40 --out s.safetensors",
    "sample digits --statistics s.safetensors --steps 3 --n 2 --out f.npz",
    "evaluate digits --n 20 --steps 1",
    "report run --n 20 --out page.html",
    "export run exported",
    "export pixels exported-pixels",
    "systems",
    "doctor",
    "demo --minutes 0.02 --out demo.html --runs demo",
)


def test_every_command_at_work_asks_no_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list holds every command, so that a new one must join; with connections and look-ups refused all work."""
    assert {words.split()[0] for words in AT_WORK} == set(COMMANDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "main", partial(demo.main, teacher="digits", data="digits", samples=20))
    pixel_pipeline(Path("pixels"))
    text_pipeline(Path("text"))
    with sockets_blocked() as asked:
        codes = {words: main(words.split()) for words in AT_WORK}
    assert asked == []
    # the doctor tells what is wrong with the machine
    assert {words: code for words, code in codes.items() if code and words != "doctor"} == {}


def test_the_block_notices_a_contact() -> None:
    """Otherwise the test above could not fail."""
    import urllib.request

    with sockets_blocked() as asked, pytest.raises(Exception, match="network was asked for"):
        urllib.request.urlopen("http://127.0.0.1:9/")
    assert asked


def test_without_a_network(tmp_path: Path) -> None:
    """A pipeline is sampled in a network namespace of its own, without even a loopback, where the system has them."""
    text_pipeline(tmp_path / "text")
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        alone = []
    words = ["sample", "text", "--n", "1", "--steps", "2", "--prompt", "a", "--out", "made.npz"]
    done = subprocess.run(
        [*alone, sys.executable, "-m", "fewstep.cli", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made.npz").is_file()


# --- the calls that open files, run code or talk to hosts ---------------------------------------------------------

SOURCE = Path(str(demo.__file__)).parent

#: Modules that unpickle, talk to hosts or start processes, and who may import them for what.
MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "urllib", "urllib3", "requests",
    "http", "httpx", "aiohttp", "ftplib", "socket", "ssl", "subprocess", "huggingface_hub", "datasets",
}  # fmt: skip
IMPORTS = {
    ("metrics/features.py", "pickle"),  # the error that torch.load raises
    ("doctor.py", "subprocess"),  # python -c "import torchvision"
}

#: Calls by the last part of their names.  "load" counts on modules only: torch.load, np.load, ..
OPENING = {
    "open", "read_text", "read_bytes", "safe_open", "load_file", "load_safetensors", "loads", "decompress", "ZipFile",
    "ParquetFile", "OSFile", "open_stream",
}  # fmt: skip
RUNNING = {
    "eval", "exec", "compile", "__import__", "import_module", "system", "popen", "Popen", "check_output",
    "from_pretrained", "from_single_file", "from_config", "download", "hf_hub_download", "snapshot_download",
    "load_dataset", "urlopen", "urlretrieve", "load_state_dict_from_url", "load_lora_weights",
    "FeatureExtractorInceptionV3", "load_textual_inversion", "load_attn_procs",
}  # fmt: skip
LOADERS = {"torch", "np", "numpy", "pickle", "yaml", "dcp", "joblib", "safetensors"}

#: Every such call in the package, with the arguments that make it safe; a method of an object without its object.
ALLOWED: dict[tuple[str, str], tuple[str, ...]] = {
    # JSON from outside: one place, within limits
    ("schemas.py", "json.loads"): ("object_pairs_hook=unique",),
    ("schemas.py", ".open"): (),
    # plain data that was plain data a moment ago, or ships with the package
    ("runs/record.py", "json.loads"): (),
    ("hub/saved_adapters.py", "json.loads"): (),
    ("hub/language.py", "json.loads"): (),
    ("hub/export_files.py", "json.loads"): (),
    ("hub/export_files.py", ".read_text"): (),
    ("hub/statistics.py", "json.loads"): (),
    ("networks/classifier.py", "json.loads"): (),
    ("networks/classifier.py", ".read_text"): (),
    ("networks/classifier.py", ".read_bytes"): (),
    ("networks/classifier.py", "load_safetensors"): (),
    ("metrics/quality.py", "json.loads"): (),
    ("report/comparison.py", "json.loads"): (),
    ("cli/methods.py", ".read_text"): (),
    ("report/machine.py", ".read_text"): (),
    ("report/machine.py", "platform.system"): (),
    ("doctor.py", ".read_bytes"): (),
    # tensors: safetensors, arrays without objects
    ("files.py", "load_file"): (),
    ("hub/statistics.py", "safe_open"): (),
    ("files.py", "safe_open"): (),
    ("training/checkpoint.py", "safe_open"): (),
    ("training/snapshots.py", "safe_open"): (),
    ("training/sharding.py", "dcp.load"): ("storage_reader=reader",),
    ("data/arrays.py", "safe_open"): (),
    ("data/arrays.py", "zipfile.ZipFile"): (),
    ("data/arrays.py", "np.load"): ("allow_pickle=False",),
    ("metrics/features.py", "torch.load"): ("weights_only=True",),
    ("networks/lpips.py", "torch.load"): ("weights_only=True",),
    ("metrics/features.py", "FeatureExtractorInceptionV3"): ("feature_extractor_weights_path=str(weights)",),
    # data of other kinds
    ("data/idx.py", ".open"): (),
    ("data/captions.py", ".open"): (),
    ("data/captions.py", ".read_text"): (),
    ("data/encoded.py", "safe_open"): (),
    ("data/pictures.py", "Image.open"): (),
    ("data/pictures.py", ".read_bytes"): (),  # hashed
    ("data/tables.py", "pa.OSFile"): (),
    ("data/tables.py", "pa.ipc.open_stream"): (),
    ("data/parquet.py", "pq.ParquetFile"): (),
    ("data/text.py", ".read_text"): (),
    ("data/text.py", "read_text"): (),  # the function around it
    # files that are written, locked, or hashed
    ("cli/__init__.py", "os.open"): (),
    ("runs/record.py", ".open"): (),
    ("files.py", ".open"): (),
    ("training/progress.py", ".open"): (),
    # modules of our own, and of the packages that the code names
    ("__init__.py", "import_module"): (),
    ("cli/__init__.py", "import_module"): (),
    ("methods/__init__.py", "import_module"): (),
    ("report/tasks/__init__.py", "import_module"): (),
    ("hub/__init__.py", "importlib.import_module"): (),
    ("hub/requires.py", "importlib.import_module"): (),
    ("hub/source.py", "importlib.import_module"): (),
    # diffusers, after hub/folders.py has looked at the folder
    ("hub/diffusers.py", "diffusers.DiffusionPipeline.from_pretrained"): (
        "use_safetensors=True", "local_files_only=True",
    ),
    ("hub/diffusers.py", "kind.from_pretrained"): ("use_safetensors=True", "local_files_only=True"),
    ("hub/diffusers.py", "diffusers.DiffusionPipeline.download"): (
        "use_safetensors=True", "local_files_only=local_only",
    ),
    # transformers' causal models, after hub/language.py has looked at the folder
    ("hub/language.py", "transformers.AutoModelForCausalLM.from_pretrained"): (
        "use_safetensors=True", "local_files_only=True", "trust_remote_code=False",
    ),
    ("hub/tokenizers.py", "transformers.AutoTokenizer.from_pretrained"): (
        "local_files_only=True", "trust_remote_code=False",
    ),
    ("hub/saved_adapters.py", "model_class.from_config"): (),
    ("hub/scheduler_config.py", ".from_config"): (),
    ("hub/diffusers.py", "SolverScheduler.from_config"): (),
}  # fmt: skip


def called(node: ast.Call) -> str | None:
    """The name of a call that opens, runs or loads; None for any other."""
    last = (
        node.func.attr
        if isinstance(node.func, ast.Attribute)
        else node.func.id
        if isinstance(node.func, ast.Name)
        else ""
    )
    if last not in OPENING | RUNNING | {"load"}:
        return None
    name = ast.unparse(node.func)
    if last == "load":
        return name if name.partition(".")[0] in LOADERS else None
    if last == "eval" and name != "eval":  # a module put into evaluation mode
        return None
    modules = isinstance(node.func, ast.Attribute) and all(
        isinstance(part, ast.Attribute | ast.Name | ast.Load) for part in ast.walk(node.func)
    )
    whole = isinstance(node.func, ast.Name) or (modules and last not in {"open", "read_text", "read_bytes"})
    return name if whole or name in {"Image.open", "os.open"} else f".{last}"


@cache
def sites() -> list[tuple[str, ast.AST]]:
    return [
        (str(path.relative_to(SOURCE)), node)
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
    ]


def test_every_call_that_opens_something_is_known_and_safe() -> None:
    """A new one must be added here, with the arguments that make it safe; one that has gone must be taken out."""
    found: dict[tuple[str, str], list[str]] = {}
    for file, node in sites():
        if isinstance(node, ast.Call) and (name := called(node)):
            given = [ast.unparse(keyword) for keyword in node.keywords]
            lacking = [wanted for wanted in ALLOWED.get((file, name), ()) if wanted not in given]
            found.setdefault((file, name), []).extend(lacking)
    assert set(found) - set(ALLOWED) == set(), "calls that nobody has allowed"
    assert {site: lacking for site, lacking in found.items() if lacking} == {}, "calls without their safe arguments"
    assert set(ALLOWED) - set(found) == set(), "calls that are gone"


def test_no_module_that_unpickles_or_talks_is_imported() -> None:
    found = set()
    for file, node in sites():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found |= {(file, name) for name in names if name.partition(".")[0] in MODULES}
    assert found == IMPORTS
