"""Parts that the reference networks share: time and class conditioning, extra inputs, normalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


class PositionalEmbedding(nn.Module):
    """``[cos(w t), sin(w t)]`` with ``width / 2`` frequencies spaced geometrically in ``[low, high]``.

    The highest frequency is kept small on purpose: the time derivative of the network enters continuous-time
    consistency losses, and large Fourier scales make it explode (Lu & Song 2024, section 4.1).
    """

    frequencies: Tensor

    def __init__(self, width: int, low: float = 0.25, high: float = 16.0) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width={width} must be an even number, at least 2")
        frequencies = torch.logspace(math.log10(low), math.log10(high), width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[..., None] * self.frequencies.to(t)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Conditioning(nn.Module):
    """The embedding of time, class label and extra inputs that modulates a network: ``[B, width]``.

    Labels run from 0 to ``classes - 1``; None selects the learned null label, and so does a label of -1, which lets
    one batch mix conditional and unconditional samples.  Every name in ``extras`` adds an input ``[B]`` through its
    own embedding with a zero-initialised projection, so that a network with a new input starts as the one without.
    """

    def __init__(self, width: int, classes: int | None, extras: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.classes = classes
        self.time = PositionalEmbedding(width)
        self.time_projection = nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.extras = nn.ModuleDict({name: zeroed(nn.Linear(width, width, bias=False)) for name in extras})
        self.out = nn.Linear(width, width)

    def forward(self, t: Tensor, cond: Tensor | None, extras: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        if set(extras) != set(self.extras):
            raise TypeError(f"the network takes the extra inputs {sorted(self.extras)}, it was given {sorted(extras)}")
        if t.ndim != 1:
            raise ValueError(f"times of shape {list(t.shape)}: this network takes one time a sample, [B]")
        hidden = self.time_projection(self.time(t).to(dtype))
        if self.label is not None:
            hidden = hidden + self.label(self.labels(cond, t))
        elif cond is not None:
            raise ValueError("class labels were given to an unconditional network")
        for name, projection in self.extras.items():
            hidden = hidden + projection(self.time(extras[name].to(t)).to(dtype))
        return nn.functional.silu(self.out(nn.functional.silu(hidden)))

    def labels(self, cond: Tensor | None, t: Tensor) -> Tensor:
        """Label indices with the null label at ``classes``."""
        classes = self.classes or 0
        if cond is None:
            return torch.full(t.shape, classes, dtype=torch.long, device=t.device)
        return torch.where(cond < 0, classes, cond)


class Beside(nn.Module):
    """Adds a second sample, given beside the state, to the first hidden layer: a network's own last estimate
    (self-conditioning), a picture of lower resolution.

    ``layer`` maps it to the hidden layer without a bias and starts at zero, so that the network starts as the one
    without, and None stands for zeros.  ValueError for a second sample that the network was not made for.
    """

    def __init__(self, channels: int, layer: nn.Linear | nn.Conv2d | nn.Conv3d | None) -> None:
        super().__init__()
        if channels < 0:
            raise ValueError(f"beside={channels} must not be negative")
        self.layer = None if layer is None else zeroed(layer)

    def forward(self, hidden: Tensor, beside: Tensor | None) -> Tensor:
        if beside is None:
            return hidden
        if self.layer is None:
            raise ValueError("this network takes no second sample: make it with beside=channels")
        return hidden + self.layer(beside)


def pixel_norm(x: Tensor, eps: float = 1e-4) -> Tensor:
    """``x / rms(x)`` over the last dimension (the "double normalisation" of sCM's adaptive group norm)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class GroupNorm(nn.GroupNorm):
    """Group normalisation that has a forward-mode derivative on channels-last samples too, where PyTorch's raises.

    The written-out form is used under a jvp only: it is several times slower.  Half precision on a CPU is computed in
    float32, as autocast does on CUDA: PyTorch's own kernel for channels-last bfloat16 takes two to three times as long
    as the casts there and back, and rounds more.
    """

    def forward(self, x: Tensor) -> Tensor:
        if forward_ad.unpack_dual(x).tangent is None:
            if x.device.type != "cpu" or torch.finfo(x.dtype).bits >= 32:
                # what nn.functional.group_norm calls after refusing one sample of one value a group, but not two
                return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
            weight, bias = (self.weight.float(), self.bias.float()) if self.affine else (None, None)
            return torch.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        groups = x.unflatten(1, (self.num_groups, -1))
        inside = tuple(range(2, groups.ndim))
        variance, mean = torch.var_mean(groups, dim=inside, correction=0, keepdim=True)
        normalised = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        if not self.affine:
            return normalised
        view = (-1,) + (1,) * (x.ndim - 2)
        return torch.addcmul(self.bias.view(view), normalised, self.weight.view(view))


class Dropout(nn.Dropout):
    """Dropout whose mask depends on the shape alone: PyTorch's fills it in another order under a jvp on channels-last
    pictures, and a tangent must see the mask of the forward pass that it belongs to."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape, device=x.device) >= self.p
        return x * kept / max(1 - self.p, torch.finfo(x.dtype).tiny)  # p = 1 keeps nothing: 0, not 0 / 0


class Modulation(nn.Module):
    """Scale and shift of normalised features by the conditioning, ``norm(x) (1 + scale) + shift``.

    Starts as plain normalisation.  ``double_norm`` pixel-normalises scale and shift (Lu & Song 2024, section 4.1).
    """

    def __init__(self, width: int, features: int, double_norm: bool = False) -> None:
        super().__init__()
        self.projection = zeroed(nn.Linear(width, 2 * features))
        self.double_norm = double_norm

    def forward(self, normalised: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.projection(emb).chunk(2, dim=-1)
        if self.double_norm:
            scale, shift = pixel_norm(scale), pixel_norm(shift)
        view = scale.shape + (1,) * (normalised.ndim - 2)
        return torch.addcmul(shift.reshape(view), normalised, 1 + scale.reshape(view))


def zeroed(module: nn.Linear | nn.Conv2d | nn.Conv3d) -> nn.Module:
    """``module`` with its parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
