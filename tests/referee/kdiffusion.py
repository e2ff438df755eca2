"""k-diffusion's samplers as a referee, without k-diffusion's dependencies.

Only ``sampling.py`` is wanted, but importing the package pulls in wandb, clip and kornia.  The wheel is installed with
``pip install --no-deps k-diffusion==0.1.1.post1`` and that one file is loaded by its path, under a stand-in package
whose ``utils`` holds the one function that the samplers use.  A missing wheel is an error, never a skip.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

INSTALL = "pip install --no-deps k-diffusion==0.1.1.post1 && pip install torchdiffeq torchsde scipy tqdm"


def _load() -> ModuleType:
    spec = importlib.util.find_spec("k_diffusion")  # finds, does not import
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the referee k-diffusion is not installed: {INSTALL}")
    package, utils = ModuleType("k_diffusion_alone"), ModuleType("k_diffusion_alone.utils")
    package.__path__ = []
    utils.append_dims = lambda x, ndim: x.reshape(x.shape + (1,) * (ndim - x.ndim))
    package.utils = utils
    sys.modules.update({package.__name__: package, utils.__name__: utils})
    path = Path(spec.origin).with_name("sampling.py")
    own = importlib.util.spec_from_file_location("k_diffusion_alone.sampling", path)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    sys.modules[own.name] = module
    own.loader.exec_module(module)
    return module


sampling = _load()
