"""Reference networks: an MLP for points and small pictures, and a space-to-depth U-Net."""

from fewstep.networks.mlp import MLP
from fewstep.networks.unet import UNet

NETWORKS = {"mlp": MLP, "unet": UNet}

__all__ = ["MLP", "NETWORKS", "UNet"]
