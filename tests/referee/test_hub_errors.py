"""Bad folders and missing packages get one clear line; nothing is ever unpickled; imports stay lazy."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from fewstep.hub.diffusers import from_pipeline, load_model, load_pipeline, wrap  # noqa: E402
from fewstep.hub.requires import require  # noqa: E402
from fewstep.hub.schedulers import read_scheduler  # noqa: E402


def unet(**changes: Any) -> Any:
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
    }  # fmt: skip
    return diffusers.UNet2DModel(**{**config, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_missing_folder_and_missing_pipeline(tmp_path: Path, folder: Path) -> None:
    """A folder that is not there, an empty one, a bare model and an id that is not cached are told apart."""
    with pytest.raises(FileNotFoundError, match="no such folder") as error:
        load_pipeline(tmp_path / "nowhere")
    assert "nowhere" in one_line(error)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        load_pipeline(tmp_path / "empty")
    with pytest.raises(ValueError, match="read it with load_model"):
        load_pipeline(folder / "unet")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_model(tmp_path / "empty", diffusers.DDPMScheduler())
    with pytest.raises(FileNotFoundError, match="pass local_only=False to download it") as error:
        load_pipeline("nobody/this-pipeline-is-not-cached")
    one_line(error)


def test_damaged_folder(folder: Path) -> None:
    """A broken index, missing weights and truncated weights name the folder."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="pipe") as error:
        load_pipeline(folder)
    one_line(error)
    weights.unlink()
    with pytest.raises(ValueError, match="pipe") as error:
        load_pipeline(folder)
    one_line(error)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json: not valid JSON"):
        load_pipeline(folder)


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_pickles_are_refused_and_never_run(folder: Path, tmp_path: Path) -> None:
    """Weights that only a pickle holds are refused by name, before anything is read from it."""
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pickled = folder / "unet" / "diffusion_pytorch_model.bin"
    pickled.write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    for load in (lambda: load_pipeline(folder), lambda: load_model(folder / "unet", diffusers.DDPMScheduler())):
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin: pickled weights are never read") as error:
            load()
        one_line(error)
    assert not (tmp_path / "sprung").exists()


def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    """A pipeline that brings its own Python is refused."""
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["own", "Own"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'sprung')!r})")
    with pytest.raises(ValueError, match=r"own\.py: a pipeline with code of its own is not read") as error:
        load_pipeline(folder)
    one_line(error)
    assert not (tmp_path / "sprung").exists()


def test_unknown_classes_and_predictions() -> None:
    """Unknown scheduler classes, prediction types and network classes are named with what is known."""
    with pytest.raises(ValueError, match="scheduler class 'KarrasVeScheduler' is unknown; fewstep reads DDIM"):
        read_scheduler(diffusers.KarrasVeScheduler())
    scheduler = diffusers.DDPMScheduler(prediction_type="epsilon")
    scheduler.register_to_config(prediction_type="magic")
    with pytest.raises(ValueError, match="prediction_type 'magic' is unknown; fewstep reads epsilon, sample"):
        read_scheduler(scheduler)
    with pytest.raises(ValueError, match="only 'epsilon'"):
        read_scheduler(diffusers.EDMEulerScheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="only 'discrete'"):
        read_scheduler(diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="undefined at zero terminal SNR"):
        read_scheduler(diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="model class 'UNet1DModel' is unknown; fewstep reads UNet2DModel"):
        wrap(diffusers.UNet1DModel(block_out_channels=(32, 32, 64)), diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="no unet or transformer"):
        from_pipeline(diffusers.DDPMPipeline(None, diffusers.DDPMScheduler()))
    with pytest.raises(ValueError, match=r"pass size=\(height, width\)"):
        wrap(unet(sample_size=None), diffusers.DDPMScheduler())
    assert wrap(unet(sample_size=None), diffusers.DDPMScheduler(), size=(8, 16)).shape == (1, 8, 16)


def test_unknown_model_folder(folder: Path) -> None:
    """The config of a bare model names a class that fewstep does not read."""
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "os"}))
    with pytest.raises(ValueError, match="model class 'os' is unknown"):
        load_model(folder / "unet", diffusers.DDPMScheduler())


def test_conditions_are_checked() -> None:
    """Labels for an unconditional network and missing prompts are refused."""
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="class labels were given to an unconditional network"):
        wrap(unet(), diffusers.DDPMScheduler())(x, 5.0, torch.tensor([0, 1]))
    text = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, cross_attention_dim=6, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="knows no empty prompt: pass cond, a dict of prompt_embeds"):
        wrap(text, diffusers.DDPMScheduler())(x, 5.0)
    with pytest.raises(ValueError, match="a network without time_cond_proj_dim was called with w="):
        wrap(text, diffusers.DDPMScheduler())(x, 5.0, torch.zeros(2, 3, 6), w=torch.ones(2))


def test_missing_package_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without diffusers or peft the error says what to install; a failure inside a package is not hidden."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs diffusers: pip install 'fewstep\[hub\]'") as error:
        load_pipeline(folder)
    one_line(error)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"LoRA students needs peft: pip install 'fewstep\[hub\]'"):
        require("peft", "LoRA students")
    (folder / "halfbroken.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        require("halfbroken", "this test")


def test_importing_the_hub_imports_no_diffusers() -> None:
    """The package, its adapters and the way out are importable without the extra."""
    code = (
        "import sys\n"
        "sys.modules.update(diffusers=None, peft=None, transformers=None)\n"
        "import fewstep.hub, fewstep.hub.native, fewstep.hub.lora\n"
        "from fewstep.hub import export, load_pipeline\n"
        "assert callable(export) and callable(load_pipeline)\n"
    )
    source = str(Path(sys.modules["fewstep.hub.requires"].__file__ or "").parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source})
