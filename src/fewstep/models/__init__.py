"""What is loaded, sampled, saved and compared."""

from fewstep.models.kinds import KINDS, model_of
from fewstep.models.model import Model

__all__ = ["KINDS", "Model", "model_of"]
