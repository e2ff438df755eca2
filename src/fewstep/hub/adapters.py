"""Diffusers models as networks ``F(x, t, cond)``: one small class per call signature.

Time inputs are those of the diffusers schedulers (0 .. 1000), conditions are class labels ``[B]`` (-1 or None: the null
label) or a dict of tensors with the batch leading (a bare tensor means ``prompt_embeds``):

=========================  =======================  ===============================================================
``prompt_embeds``          ``[B, L, D]``            text models (Kandinsky 2.1: the text encoder's hidden states)
``pooled_prompt_embeds``   ``[B, P]``               SDXL, Kolors, Stable Diffusion 3, Flux, Kandinsky 2.1
``time_ids``               ``[B, 6]``               SDXL, Kolors (size, crop, target size in pixels; SDXL's refiner: 5)
``prompt_attention_mask``  ``[B, L]``               Sana
``image_embeds``           ``[B, D]``               Kandinsky
``class_labels``           ``[B]`` or ``[B, D]``    U-Nets with a class embedding (upscalers: the noise level)
``concat``                 ``[B, C, h, w]``         networks with more input channels than samples have, in the order
                                                    of :data:`BESIDE` (inpainting: mask, masked latents)
``guidance_scale``         ``[B]``                  LCM U-Nets, Flux with a guidance input: the pipeline's
                                                    ``guidance_scale``; may be left out, its default is the pipeline's
=========================  =======================  ===============================================================

Only the first channels of an output are kept, as many as a sample has: what follows is a learned variance.
"""

from __future__ import annotations

import inspect
import json
import math
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.hub.autoencoders import autoencoder_name, latent_channels, pixels_per_latent, step_of_sides
from fewstep.hub.folders import check_config
from fewstep.hub.requires import require
from fewstep.schemas import Place, check

#: What pipelines put beside the noisy channels of their network's input: the condition ``concat``, in its order.
BESIDE = {
    "StableDiffusionInpaintPipeline": "the mask, then the masked picture's latents",
    "StableDiffusionXLInpaintPipeline": "the mask, then the masked picture's latents",
    "StableDiffusion3InpaintPipeline": "the mask, then the masked picture's latents",
    "PaintByExamplePipeline": "the masked picture's latents, then the mask",
    "KandinskyInpaintPipeline": "the masked picture's latents, then the mask",
    "KandinskyV22InpaintPipeline": "the masked picture's latents, then the mask",
    "StableDiffusionInstructPix2PixPipeline": "the picture's latents",
    "StableDiffusionXLInstructPix2PixPipeline": "the picture's latents",
    "StableDiffusionDepth2ImgPipeline": "the depth in [-1, 1]",
    "StableDiffusionUpscalePipeline": "the small picture with noise",
    "LDMSuperResolutionPipeline": "the small picture",
    "FluxFillPipeline": "the masked picture's latents, then the 8x8 pixels of the mask as channels",
    "FluxControlPipeline": "the control picture's latents",
    "FluxControlImg2ImgPipeline": "the control picture's latents",
}


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
    #: Whether the network takes the guidance scale as an input.
    takes_guidance: bool = False
    #: Whether its students go back into the pipeline that it came from, which knows its conditions.
    in_own_pipeline: bool = False
    #: Whether that pipeline makes samples of the config's size only.
    fixed_size: bool = False
    classes: int | None = None
    #: Names of the weights that LoRA froze (they are buffers then), see :mod:`fewstep.hub.lora`.
    frozen: tuple[str, ...] = ()
    #: SHA-256 of those, where they are the ones in the pipeline's folder and need not be kept a second time.
    base: str | None = None

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.origin = origin
        self.size = self.config_size() if size is None else size
        #: Whether a call has succeeded.
        self.ran = False
        #: Whether samples are latents, of an autoencoder that may be out of reach.
        self.latent = origin is not None and autoencoder_name(origin.pipe) is not None

    @property
    def reads_prompts(self) -> bool:
        """Whether the network's pipeline can make the text part of its condition."""
        return False

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """The condition for ``prompts``, from the text encoders of the network's pipeline, as its own call makes it;
        ValueError for a network that reads no text."""
        raise ValueError(f"a {type(self.model).__name__} reads no prompts")

    @property
    def takes(self) -> int:
        """The channels of the network's input."""
        return int(self.model.config.in_channels)

    @property
    def gives(self) -> int:
        """The channels of the network's output."""
        return int(self.model.config.out_channels or self.takes)

    @property
    def channels(self) -> int:
        """The channels of one sample: the autoencoder's, or of a network without one the fewer of what goes in and
        comes out."""
        latent = None if self.origin is None else latent_channels(self.origin.pipe)
        return min(self.takes, self.gives) if latent is None else latent

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one sample."""
        return (self.channels, *self.size)

    def config_size(self) -> tuple[int, int]:
        """Height and width of one sample in the model's config; ValueError when it names none."""
        size = self.model.config.sample_size
        if size is None:
            raise ValueError(f"{type(self.model).__name__}: its config has no sample_size; pass size=(height, width)")
        height_width = (size, size) if isinstance(size, int) else tuple(size)
        if len(height_width) != 2 or min(height_width) < 1:
            raise ValueError(f"{type(self.model).__name__}: sample_size={size} must be height and width, at least 1")
        return height_width

    def sides(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the samples that are pictures of ``size`` pixels; ValueError when there are none."""
        scale = 1 if self.origin is None else pixels_per_latent(self.origin.pipe)
        step = self.patch if self.origin is None else step_of_sides(self.origin.pipe, self.patch)
        if any(side < step or side % step for side in size):
            raise ValueError(f"size={size[0]}x{size[1]}: height and width in pixels must be multiples of {step}")
        return size[0] // scale, size[1] // scale

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The shape of a sample that is a picture of ``size`` pixels, for :func:`fewstep.sampling.sample`.

        ValueError when the network cannot make it, or sees its size in its condition.
        """
        sides = self.sides(size)
        if "time_ids" in self.needs() and sides != self.size:
            raise ValueError(
                f"size={size[0]}x{size[1]}: this network sees the size in its condition, so load the model with it: "
                "load(folder, size=(height, width))"
            )
        return (self.channels, *sides)

    def called(self, *given: Any, **named: Any) -> Tensor:
        """What the diffusers model gives back.

        Diffusers finds at the first call that a config cannot be: ValueError naming the model where it fails there.
        """
        if self.ran:  # nothing is caught in a compiled or long run
            return self.model(*given, return_dict=False, **named)[0]
        try:
            out: Tensor = self.model(*given, return_dict=False, **named)[0]
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            if isinstance(error, NotImplementedError) or "memory" in str(error):  # of PyTorch's rules, of the machine
                raise
            folder = None if self.origin is None else self.origin.pipe.name_or_path
            where = f"{folder}/{self.component}: " if folder else ""
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{where}{type(self.model).__name__}: its first call failed ({first[:200]}); its config, or the size "
                "of the samples, cannot be"
            ) from error
        self.ran = True
        return out

    def needs(self) -> dict[str, tuple[int | None, ...]]:
        """The conditions that the network cannot do without, by name, with the shape of one row (None: any length)."""
        beside = self.takes - self.channels
        return {"concat": (beside, None, None)} if beside else {}

    def optional(self) -> dict[str, tuple[int | None, ...]]:
        """The conditions that may be left out."""
        return {"guidance_scale": ()} if self.takes_guidance else {}

    def lacks(self) -> dict[str, tuple[int | None, ...]]:
        """The conditions that cannot be left out, because nothing stands for them when there is no condition."""
        return self.needs()

    def empty(self, n: int) -> dict[str, Tensor] | None:
        """What stands for no condition, for ``n`` samples; None where nothing does."""
        return None

    def listed(self, conditions: dict[str, tuple[int | None, ...]]) -> str:
        """Names and shapes of conditions as a message lists them."""
        beside = None if self.origin is None else BESIDE.get(type(self.origin.pipe).__name__)
        said = "" if beside is None or "concat" not in conditions else f" ({beside})"
        return ", ".join(f"{name} {_shape(shape)}" for name, shape in conditions.items()) + said

    def checked(self, given: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """``given`` when it is what the network takes for the samples ``x``; ValueError naming what is wrong."""
        model, known = type(self.model).__name__, {**self.needs(), **self.optional()}
        if missing := {name: shape for name, shape in self.needs().items() if name not in given}:
            raise ValueError(f"cond: this {model} needs {self.listed(missing)} as well")
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"cond: this {model} takes no '{name}', only {', '.join(known)}")
            shape = value.shape[1:]
            if len(value) != len(x) or len(shape) != len(known[name]) or any(
                wanted not in (None, found) for wanted, found in zip(known[name], shape, strict=True)
            ):  # fmt: skip
                raise ValueError(
                    f"cond: {name} has the shape {list(value.shape)}, this {model} needs {_shape(known[name])} for "
                    f"{len(x)} samples"
                )
        return given

    def with_concat(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        """The network's input: ``x`` and the channels beside it."""
        if "concat" not in given:
            return x
        beside = given["concat"].to(x)
        if beside.shape[2:] != x.shape[2:]:
            raise ValueError(f"cond: concat is {list(beside.shape[2:])} large, the samples are {list(x.shape[2:])}")
        return torch.cat([x, beside], dim=1)

    def guidance_scale(self, given: dict[str, Tensor], x: Tensor) -> Tensor:
        """The guidance scale that the network is given ``[B]``, of the type of ``x``."""
        return given["guidance_scale"].to(x) if "guidance_scale" in given else x.new_full((len(x),), self.guidance)

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


def _shape(row: tuple[int | None, ...]) -> str:
    """A shape with the batch leading, as it is written."""
    return f"[{', '.join(['B', *('any' if length is None else str(length) for length in row)])}]"


class UNetAdapter(Adapter):
    """Common to U-Nets: the bottleneck is the lowest resolution."""

    component = "unet"

    @property
    def patch(self) -> int:
        return 1

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        channels = self.model.config.block_out_channels
        height, width = (-(-side // 2 ** (len(channels) - 1)) for side in self.size)
        return (channels[-1], height, width)

    def bottleneck(self) -> nn.Module:
        middle: nn.Module = self.model.mid_block
        return middle


def as_adapter(net: Any) -> Adapter | None:
    """A network where it is diffusers', None where it is another's."""
    return net if isinstance(net, Adapter) else None


class LabelAdapter(Adapter):
    """Common to class-conditional models: ``null`` is the label that stands for "no class" (None: there is none)."""

    null: int | None = None

    def optional(self) -> dict[str, tuple[int | None, ...]]:
        return {**super().optional(), **({} if self.classes is None else {"class_labels": ()})}

    def conditions(self, cond: Cond, x: Tensor) -> dict[str, Tensor]:
        """The condition as a dict, the labels in it those that the network takes."""
        if isinstance(cond, Tensor) and self.classes is None:
            raise ValueError("class labels were given to an unconditional network")
        given = {} if cond is None else {"class_labels": cond} if isinstance(cond, Tensor) else dict(cond)
        given = self.checked(given, x)
        if self.classes is None:
            return given
        labels = given.get("class_labels", torch.full((len(x),), -1, device=x.device))
        if self.null is not None:
            labels = torch.where(labels < 0, self.null, labels)
        elif bool((labels < 0).any()):
            raise ValueError("this network was trained with class labels only: pass cond, it has no null label")
        return {**given, "class_labels": labels}


class UNet2D(UNetAdapter, LabelAdapter):
    """UNet2DModel: unconditional, or conditional on class labels; LDM's upscaler takes the small picture as
    ``concat``."""

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(model, origin, size)
        if model.config.class_embed_type is not None:
            raise ValueError(
                f"UNet2DModel: class_embed_type '{model.config.class_embed_type}' is not read, only labels"
            )
        self.classes = model.config.num_class_embeds
        self.integer_times = model.config.time_embedding_type == "learned"

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        time = t.round().long() if self.integer_times else t
        given = self.conditions(cond, x)
        out = self.called(self.with_concat(x, given), time, class_labels=given.get("class_labels"))
        return out[:, : x.shape[1]]


class DiT(LabelAdapter):
    """DiTTransformer2DModel: conditional on class labels, with a null label after the last class."""

    in_own_pipeline = True
    fixed_size = True

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(model, origin, size)
        self.classes = self.null = model.config.num_embeds_ada_norm
        for block in model.transformer_blocks:
            # in training mode the model would drop labels by itself, with unseeded randomness
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        labels = self.conditions(cond, x)["class_labels"]
        out = self.called(x, timestep=t, class_labels=labels)
        return out[:, : x.shape[1]]


class TextAdapter(Adapter):
    """Common to text models; ``set_null`` gives the condition that None stands for (what guidance leads away from)."""

    in_own_pipeline = True
    null_names: tuple[str, ...] = ()

    def set_null(self, cond: dict[str, Tensor]) -> None:
        """Use ``cond`` (one row a tensor) as the unconditional branch."""
        for name, value in cond.items():
            self.register_buffer(f"null_{name}", value.detach(), persistent=False)
        self.null_names = tuple(cond)

    def lacks(self) -> dict[str, tuple[int | None, ...]]:
        return {name: shape for name, shape in self.needs().items() if name not in self.null_names}

    def empty(self, n: int) -> dict[str, Tensor] | None:
        """The condition that :meth:`set_null` was given."""
        rows = {name: self.get_buffer(f"null_{name}") for name in self.null_names}
        return {name: row.expand(n, *row.shape[1:]) for name, row in rows.items()} or None

    def conditions(self, cond: Cond, x: Tensor) -> dict[str, Tensor]:
        """The condition as a dict; ValueError when it is not what the network needs."""
        given = self.empty(len(x)) if cond is None else {"prompt_embeds": cond} if isinstance(cond, Tensor) else cond
        if given is None:
            needs, model = self.listed(self.needs()), type(self.model).__name__
            raise ValueError(f"this {model} knows no empty prompt: pass cond, a dict of {needs}")
        return self.checked(dict(given), x)

    @property
    def reads_prompts(self) -> bool:
        """Whether the network's pipeline can make the text part of its condition."""
        if self.origin is None or "image_embeds" in self.needs():
            return False
        pipe = self.origin.pipe
        if pipe.components.get("tokenizer") is None:
            return False
        if pipe.components.get("bert") is not None:
            return True
        encode = next((vars(cls)["encode_prompt"] for cls in type(pipe).__mro__ if "encode_prompt" in vars(cls)), None)
        # some editing pipelines have one that takes no prompt
        takes = encode is not None and "prompt" in inspect.signature(encode).parameters
        return takes and pipe.components.get("text_encoder") is not None

    def embed_null(self) -> dict[str, Tensor]:
        """What the pipeline's guidance leads away from when it is given no negative prompt, one row."""
        return self.embed([""])

    def encoded(self, prompts: list[str], **given: Any) -> tuple[Any, ...]:
        """What ``encode_prompt`` of the pipeline gives, called without guidance and with the defaults of the pipeline's
        own call (Sana's instruction to the language model, the lengths of prompts)."""
        assert self.origin is not None
        pipe = self.origin.pipe
        own = {
            "device": pipe._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
            **given,
        }
        call = inspect.signature(pipe.__call__).parameters
        taken = [name for name in inspect.signature(pipe.encode_prompt).parameters if name != "prompt"]
        arguments = {name: call[name].default for name in taken if name in call}
        arguments.update({name: value for name, value in own.items() if name in taken})
        found: tuple[Any, ...] = pipe.encode_prompt(prompts, **arguments)
        return found


class UNet2DCondition(UNetAdapter, TextAdapter):
    """UNet2DConditionModel: Stable Diffusion 1 and 2, SDXL with its pooled embedding and sizes, LCM, LDM, Kandinsky,
    inpainting and other conditions on pictures.

    ``w`` ``[B]`` is the guidance weight of LCM-style students (models with ``time_cond_proj_dim``); it is the
    pipelines' ``guidance_scale - 1`` and takes the place of the condition ``guidance_scale``.
    """

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(model, origin, size)
        config = model.config
        for field, unread in (("encoder_hid_dim_type", "ip_image_proj"), ("addition_embed_type", "image_hint")):
            if config[field] == unread:
                raise ValueError(f"UNet2DConditionModel: {field} '{unread}' is not read (unload the adapter first)")
        self.takes_guidance = config.time_cond_proj_dim is not None
        if self.takes_guidance:
            self.guidance = guidance_of(origin, 8.5)

    def needs(self) -> dict[str, tuple[int | None, ...]]:
        config = self.model.config
        width, encoder, added = config.cross_attention_dim, config.encoder_hid_dim_type, config.addition_embed_type
        width = width if isinstance(width, int) else None
        found: dict[str, tuple[int | None, ...]] = {}
        if encoder != "image_proj":
            found["prompt_embeds"] = (None, width if encoder is None else config.encoder_hid_dim)
        if encoder in ("image_proj", "text_image_proj") or added in ("image", "text_image"):
            found["image_embeds"] = (config.encoder_hid_dim if encoder == "image_proj" else width,)
        if added == "text_image":
            found["pooled_prompt_embeds"] = (width,)
        if added == "text_time":
            # SDXL's refiner has an aesthetic score in the place of the two numbers of a target size
            ids = 6 if self.origin is None or not self.origin.pipe.config.get("requires_aesthetics_score") else 5
            pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
            found.update({"pooled_prompt_embeds": (pooled,), "time_ids": (ids,)})
        kind = config.class_embed_type
        if kind is not None or config.num_class_embeds is not None:
            label = config.projection_class_embeddings_input_dim
            found["class_labels"] = () if kind in (None, "timestep") else (None if kind == "identity" else label,)
        return {**found, **super().needs()}

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, w: Tensor | None = None) -> Tensor:
        given = self.conditions(cond, x)
        width = self.model.config.time_cond_proj_dim
        if w is not None and width is None:
            raise ValueError(f"a network without time_cond_proj_dim was called with w={w}")
        if w is None and width is not None:
            w = self.guidance_scale(given, x) - 1
        names = {"text_embeds": "pooled_prompt_embeds", "time_ids": "time_ids", "image_embeds": "image_embeds"}
        added = {theirs: given[ours] for theirs, ours in names.items() if ours in given}
        out = self.called(
            self.with_concat(x, given),
            t,
            encoder_hidden_states=given.get("prompt_embeds"),
            class_labels=given.get("class_labels"),
            timestep_cond=None if w is None else guidance_embedding(w, width).to(x),
            added_cond_kwargs=added or None,
        )
        return out[:, : x.shape[1]]

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        assert self.origin is not None
        pipe = self.origin.pipe
        if "bert" in pipe.components:
            # LDM's text-to-image pipeline, which encodes inside its call
            words = pipe.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            return {"prompt_embeds": pipe.bert(words.input_ids.to(pipe._execution_device))[0]}
        encoded = self.encoded(prompts)
        if self.model.config.addition_embed_type != "text_time":
            return {"prompt_embeds": encoded[0]}
        return {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[2], "time_ids": self.time_ids(encoded[0])}

    def embed_null(self) -> dict[str, Tensor]:
        """The empty prompt, or zeros where the pipeline's config says so: a prompt that *is* empty is another thing."""
        found = self.embed([""])
        assert self.origin is not None
        if not self.origin.pipe.config.get("force_zeros_for_empty_prompt"):
            return found
        zeros = {name: torch.zeros_like(found[name]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        return {**found, **zeros}

    def time_ids(self, embeds: Tensor) -> Tensor:
        """SDXL's sizes ``[B, 6]`` for pictures that were not cropped."""
        assert self.origin is not None
        height, width = (side * pixels_per_latent(self.origin.pipe) for side in self.size)
        return embeds.new_tensor([[height, width, 0, 0, height, width]]).expand(len(embeds), 6)


class SD3(TextAdapter):
    """SD3Transformer2DModel."""

    def needs(self) -> dict[str, tuple[int | None, ...]]:
        config = self.model.config
        return {
            "prompt_embeds": (None, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
            **super().needs(),
        }

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        given = self.conditions(cond, x)
        out = self.called(
            hidden_states=self.with_concat(x, given),
            timestep=t,
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"],
        )
        return out

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        encoded = self.encoded(prompts)
        return {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[2]}


class Flux(TextAdapter):
    """FluxTransformer2DModel on plain latents ``[B, C, H, W]``: 2x2 patches become the channels of a token.

    ``w`` ``[B]`` is the guidance scale that guidance-distilled models take as an input, in the place of the condition
    ``guidance_scale``.
    """

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(model, origin, size)
        self.takes_guidance = bool(model.config.guidance_embeds)
        # models without the input ignore the pipeline's guidance scale
        self.guidance = guidance_of(origin, 3.5)

    @property
    def takes(self) -> int:
        return super().takes // 4

    @property
    def gives(self) -> int:
        return int(self.model.config.out_channels or self.model.config.in_channels) // 4

    @property
    def patch(self) -> int:
        return 2

    def config_size(self) -> tuple[int, int]:
        # it names none; 128 latents (1024 pixels) is the size these models were made for
        return (128, 128)

    def needs(self) -> dict[str, tuple[int | None, ...]]:
        config = self.model.config
        return {
            "prompt_embeds": (None, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
            **super().needs(),
        }

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, w: Tensor | None = None) -> Tensor:
        given = self.conditions(cond, x)
        height, width = x.shape[2] // 2, x.shape[3] // 2
        if self.takes_guidance and w is None:
            w = self.guidance_scale(given, x)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x)
        tokens = self.called(
            hidden_states=nn.functional.pixel_unshuffle(self.with_concat(x, given), 2).flatten(2).transpose(1, 2),
            timestep=t / 1000,  # the model multiplies by 1000 itself
            guidance=w,
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"],
            txt_ids=x.new_zeros(given["prompt_embeds"].shape[1], 3),
            img_ids=places,
        )
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.encoded(prompts)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


class Sana(TextAdapter):
    """SanaTransformer2DModel."""

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(model, origin, size)
        if model.config.guidance_embeds:
            raise ValueError("SanaTransformer2DModel: guidance_embeds (SANA-Sprint) is not read")

    def needs(self) -> dict[str, tuple[int | None, ...]]:
        return {"prompt_embeds": (None, self.model.config.caption_channels), **super().needs()}

    def optional(self) -> dict[str, tuple[int | None, ...]]:
        return {"prompt_attention_mask": (None,), **super().optional()}

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        given = self.conditions(cond, x)
        out = self.called(
            self.with_concat(x, given),
            encoder_hidden_states=given["prompt_embeds"],
            encoder_attention_mask=given.get("prompt_attention_mask"),
            timestep=t * self.model.config.timestep_scale,
        )
        return out[:, : x.shape[1]]

    def embed(self, prompts: list[str], **given: Any) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.encoded(prompts, **given)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def embed_null(self) -> dict[str, Tensor]:
        """The empty prompt without the instruction that the pipeline writes before prompts."""
        return self.embed([""], complex_human_instruction=None)


def guidance_of(origin: Origin | None, bare: float) -> float:
    """The default ``guidance_scale`` of the pipeline's call; ``bare`` without a pipeline."""
    taken = {} if origin is None else inspect.signature(type(origin.pipe).__call__).parameters
    return float(taken["guidance_scale"].default) if "guidance_scale" in taken else bare


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
    it came from, where its text encoders and autoencoder are."""
    folder = pipeline_folder(net)
    return {
        "class": type(net.model).__name__,
        "config": json.loads(net.model.to_json_string()),
        "size": list(net.size),
        "pipeline": None if folder is None else str(folder),
        "latent": net.latent,
    }


def pipeline_folder(net: Adapter) -> Path | None:
    """The folder of the pipeline that a model came from; None for one that lies in no folder."""
    folder = None if net.origin is None else Path(net.origin.pipe.name_or_path or "").resolve()
    return folder if folder is not None and (folder / "model_index.json").is_file() else None


def fresh(description: dict[str, Any]) -> Adapter:
    """The model of :func:`described` with fresh weights; ValueError for a class that is not known or a config that
    does not fit it."""
    name = description["class"]
    adapter_class(name)
    model_class = attrgetter(name)(require("diffusers", "reading a student of a diffusers model"))
    # a config that is text would be taken for the name of a model on the hub
    place = Place("network.config")
    config = check_config(check(description["config"], dict, place), model_class, place)
    net = adapt(model_class.from_config(config), size=description["size"])
    net.latent = description["latent"]
    return net


def rebuilt(description: dict[str, Any]) -> Adapter:
    """The model of :func:`described` in its pipeline, where that still is; else :func:`fresh`."""
    folder = description["pipeline"]
    if folder is not None and (Path(folder) / "model_index.json").is_file():
        from fewstep.hub.diffusers import network_in, open_pipeline

        found = network_in(open_pipeline(folder), description["size"])
        if isinstance(found, adapter_class(description["class"])):
            return found
    return fresh(description)
