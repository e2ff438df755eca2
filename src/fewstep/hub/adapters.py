"""Diffusers models as networks ``F(x, t, cond)``: one small module per call signature.

Time inputs are those of the diffusers schedulers (0 .. 1000), conditions are class labels ``[B]`` (-1 or None: the null
label) or, for text models, a dict of tensors with the batch leading (a bare tensor means ``prompt_embeds``):

=========================  ==========================  ============================================
``prompt_embeds``          ``[B, L, D]``               every text model
``pooled_prompt_embeds``   ``[B, P]``                  SDXL, Stable Diffusion 3, Flux
``time_ids``               ``[B, 6]``                  SDXL (size, crop and target size, in pixels)
``prompt_attention_mask``  ``[B, L]``                  Sana
=========================  ==========================  ============================================

Only the first channels of an output are kept, as many as the input has: what follows is a learned variance.
"""

from __future__ import annotations

import json
import math
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.denoisers import Cond
from fewstep.files import Place, check
from fewstep.hub.folders import check_config
from fewstep.hub.requires import require


class Origin:
    """The diffusers pipeline that a network was read from, and the name of the network in it.

    Copies of a network share it (a student must not copy its teacher's text encoders), which is all this class adds
    to the pair.
    """

    def __init__(self, pipe: Any, component: str) -> None:
        self.pipe = pipe
        self.component = component

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


class Adapter(nn.Module):
    """A diffusers model behind the signature of fewstep's networks.

    ``model`` is the diffusers model, ``origin`` the pipeline it came from (None for a bare model), ``size`` the height
    and width of one sample (default: the config's), ``classes`` the number of class labels (None without).
    """

    #: The component's name in diffusers pipelines.
    component: ClassVar[str] = "transformer"
    #: The pipeline's ``guidance_scale`` that means "one call of the network, as it is".
    guidance: float = 1.0
    classes: int | None = None
    #: Names of the weights that LoRA froze (they are buffers then), see :mod:`fewstep.hub.lora`.
    frozen: tuple[str, ...] = ()

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.origin = origin
        self.size = self.config_size() if size is None else size

    @property
    def channels(self) -> int:
        """The channels of one sample."""
        return int(self.model.config.in_channels)

    def config_size(self) -> tuple[int, int]:
        """Height and width of one sample in the model's config; ValueError when it names none."""
        size = self.model.config.sample_size
        if size is None:
            raise ValueError(f"{type(self.model).__name__}: its config has no sample_size; pass size=(height, width)")
        height_width = (size, size) if isinstance(size, int) else tuple(size)
        if len(height_width) != 2 or min(height_width) < 1:
            raise ValueError(f"{type(self.model).__name__}: sample_size={size} must be height and width, at least 1")
        return height_width

    @property
    def patch(self) -> int:
        """The side of the patch that makes one token."""
        return int(self.model.config.patch_size)

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """The shape of one sample's :meth:`features`."""
        config = self.model.config
        width = config.num_attention_heads * config.attention_head_dim
        return (width, self.size[0] // self.patch, self.size[1] // self.patch)

    def bottleneck(self) -> nn.Module:
        """The module whose output :meth:`features` gives: the middle one."""
        blocks = self.model.transformer_blocks
        middle: nn.Module = blocks[len(blocks) // 2]
        return middle

    def features(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> Tensor:
        """Activations in the middle of the network ``[B, C, h, w]``, for discriminators.

        Costs a whole forward pass: stopping in the middle would leave a sharded model in the middle, too.
        """
        seen: list[Any] = []
        handle = self.bottleneck().register_forward_hook(lambda module, given, out: seen.append(out))
        try:
            self(x, t, cond, **extras)
        finally:
            handle.remove()
        out: Tensor = seen[0][-1] if isinstance(seen[0], tuple) else seen[0]
        if out.ndim == 4:
            return out
        return out.transpose(1, 2).unflatten(2, (x.shape[2] // self.patch, x.shape[3] // self.patch))


class UNetAdapter(Adapter):
    """Common to U-Nets: the bottleneck is the lowest resolution."""

    component = "unet"

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        channels = self.model.config.block_out_channels
        height, width = (-(-side // 2 ** (len(channels) - 1)) for side in self.size)
        return (channels[-1], height, width)

    def bottleneck(self) -> nn.Module:
        middle: nn.Module = self.model.mid_block
        return middle


class LabelAdapter(Adapter):
    """Common to class-conditional models: ``null`` is the label that stands for "no class" (None: there is none)."""

    null: int | None = None

    def labels(self, cond: Cond, x: Tensor) -> Tensor | None:
        if self.classes is None:
            if cond is not None:
                raise ValueError("class labels were given to an unconditional network")
            return None
        if cond is None:
            cond = torch.full((len(x),), -1, device=x.device)
        if self.null is not None:
            return torch.where(cond < 0, self.null, cond)
        if bool((cond < 0).any()):
            raise ValueError("this network was trained with class labels only: pass cond, it has no null label")
        return cond


class UNet2D(UNetAdapter, LabelAdapter):
    """UNet2DModel: unconditional, or conditional on class labels."""

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(model, origin, size)
        self.classes = model.config.num_class_embeds
        self.integer_times = model.config.time_embedding_type == "learned"

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        time = t.round().long() if self.integer_times else t
        out: Tensor = self.model(x, time, class_labels=self.labels(cond, x), return_dict=False)[0]
        return out[:, : x.shape[1]]


class DiT(LabelAdapter):
    """DiTTransformer2DModel: conditional on class labels, with a null label after the last class."""

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(model, origin, size)
        self.classes = self.null = model.config.num_embeds_ada_norm
        for block in model.transformer_blocks:
            # in training mode the model would drop labels by itself, with unseeded randomness
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        out: Tensor = self.model(x, timestep=t, class_labels=self.labels(cond, x), return_dict=False)[0]
        return out[:, : x.shape[1]]


class TextAdapter(Adapter):
    """Common to text models; ``set_null`` gives the condition that None stands for (the empty prompt)."""

    null_names: tuple[str, ...] = ()

    def set_null(self, cond: dict[str, Tensor]) -> None:
        """Use ``cond`` (one row a tensor) as the unconditional branch."""
        for name, value in cond.items():
            self.register_buffer(f"null_{name}", value.detach(), persistent=False)
        self.null_names = tuple(cond)

    def conditions(self, cond: Cond, x: Tensor) -> dict[str, Tensor]:
        if cond is None:
            if not self.null_names:
                raise ValueError("this network needs prompt embeddings: pass cond, it knows no empty prompt")
            null = {name: self.get_buffer(f"null_{name}") for name in self.null_names}
            return {name: value.expand(len(x), *value.shape[1:]) for name, value in null.items()}
        return {"prompt_embeds": cond} if isinstance(cond, Tensor) else cond

    @classmethod
    def embed(cls, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The condition for ``prompts``, from the text encoders of a pipeline."""
        raise NotImplementedError


class UNet2DCondition(UNetAdapter, TextAdapter):
    """UNet2DConditionModel: Stable Diffusion 1 and 2, and SDXL with its pooled embedding and sizes.

    ``w`` ``[B]`` is the guidance weight of LCM-style students (models with ``time_cond_proj_dim``); it is the
    pipelines' ``guidance_scale - 1``.
    """

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, w: Tensor | None = None) -> Tensor:
        given = self.conditions(cond, x)
        added = None
        if self.model.config.addition_embed_type == "text_time":
            added = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": given["time_ids"]}
        width = self.model.config.time_cond_proj_dim
        if (w is None) != (width is None):
            raise ValueError(f"a network with time_cond_proj_dim={width} was called with w={w}")
        out: Tensor = self.model(
            x,
            t,
            encoder_hidden_states=given["prompt_embeds"],
            timestep_cond=None if w is None else guidance_embedding(w, width).to(x),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    @classmethod
    def embed(cls, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        device = pipe._execution_device
        encoded = pipe.encode_prompt(prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        if pipe.unet.config.addition_embed_type != "text_time":
            return {"prompt_embeds": encoded[0]}
        embeds, pooled = encoded[0], encoded[2]
        if pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=embeds.device)
            embeds = embeds.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        side = pipe.default_sample_size * pipe.vae_scale_factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=embeds.dtype, device=embeds.device)
        return {
            "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": sizes.expand(len(prompts), 6)
        }  # fmt: skip


class SD3(TextAdapter):
    """SD3Transformer2DModel."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        given = self.conditions(cond, x)
        out: Tensor = self.model(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return out

    @classmethod
    def embed(cls, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        encoded = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[2]}


class Flux(TextAdapter):
    """FluxTransformer2DModel on plain latents ``[B, C, H, W]``: 2x2 patches become the channels of a token.

    ``w`` ``[B]`` is the guidance scale that guidance-distilled models take as an input; ``guidance`` is its default.
    """

    guidance = 3.5

    @property
    def channels(self) -> int:
        return int(self.model.config.in_channels) // 4

    @property
    def patch(self) -> int:
        return 2

    def config_size(self) -> tuple[int, int]:
        # it names none; 128 latents (1024 pixels) is the size these models were made for
        return (128, 128)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, w: Tensor | None = None) -> Tensor:
        given = self.conditions(cond, x)
        height, width = x.shape[2] // 2, x.shape[3] // 2
        if self.model.config.guidance_embeds and w is None:
            w = torch.full((len(x),), self.guidance, device=x.device)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x)
        tokens: Tensor = self.model(
            hidden_states=nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
            timestep=t / 1000,  # the model multiplies by 1000 itself
            guidance=w,
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"],
            txt_ids=x.new_zeros(given["prompt_embeds"].shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)

    @classmethod
    def embed(cls, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = pipe.encode_prompt(prompts, None)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


class Sana(TextAdapter):
    """SanaTransformer2DModel."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        given = self.conditions(cond, x)
        out: Tensor = self.model(
            x,
            encoder_hidden_states=given["prompt_embeds"],
            encoder_attention_mask=given.get("prompt_attention_mask"),
            timestep=t * self.model.config.timestep_scale,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    @classmethod
    def embed(cls, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """The sinusoidal embedding ``[B, width]`` of guidance weights that LCM's U-Nets take (Luo et al. 2023): sines, then
    cosines, of ``1000 w`` with frequencies from 1 to 1e-4."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(1e4) / (half - 1)))
    angle = 1000 * w[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)


#: The adapter of every diffusers model class that fewstep reads.
ADAPTERS: dict[str, type[Adapter]] = {
    "UNet2DModel": UNet2D,
    "UNet2DConditionModel": UNet2DCondition,
    "DiTTransformer2DModel": DiT,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
    "SanaTransformer2DModel": Sana,
}


def adapter_class(name: str) -> type[Adapter]:
    """The adapter of a diffusers model class; ValueError names those that are known."""
    if name not in ADAPTERS:
        raise ValueError(f"diffusers model class '{name}' is unknown; fewstep reads {', '.join(ADAPTERS)}")
    return ADAPTERS[name]


def adapt(model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> Adapter:
    """The adapter around a diffusers model; ValueError when its class is not known."""
    name = type(model).__name__
    return adapter_class(name)(model, origin, size)


def described(net: Adapter) -> dict[str, Any]:
    """A diffusers model as plain data for fewstep's own folders: its class and config, and the folder of the pipeline
    it came from, where its text encoders and autoencoder are.

    TypeError for a model with LoRA layers, whose weights are kept by :mod:`fewstep.hub.lora`.
    """
    if net.frozen:
        raise TypeError("a network with LoRA layers is not saved whole: merge them with lora.merged, or use lora.save")
    folder = None if net.origin is None else Path(net.origin.pipe.name_or_path or "").resolve()
    return {
        "class": type(net.model).__name__,
        "config": json.loads(net.model.to_json_string()),
        "size": list(net.size),
        "pipeline": str(folder) if folder is not None and (folder / "model_index.json").is_file() else None,
    }


def fresh(description: dict[str, Any]) -> Adapter:
    """The model of :func:`described` with fresh weights; ValueError for a class that is not known or a config that
    does not fit it."""
    name = description["class"]
    adapter_class(name)
    model_class = attrgetter(name)(require("diffusers", "reading a student of a diffusers model"))
    # a config that is text would be taken for the name of a model on the hub
    place = Place("network.config")
    config = check_config(check(description["config"], dict, place), model_class, place)
    return adapt(model_class.from_config(config), size=description["size"])


def rebuilt(description: dict[str, Any]) -> Adapter:
    """The model of :func:`described` in its pipeline, where that still is; else :func:`fresh`."""
    folder = description["pipeline"]
    if folder is not None and (Path(folder) / "model_index.json").is_file():
        from fewstep.hub.diffusers import load_pipeline

        found = load_pipeline(folder, size=description["size"]).denoiser.net
        if isinstance(found, adapter_class(description["class"])):
            return found
    return fresh(description)
