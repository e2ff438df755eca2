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

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.hub.autoencoders import autoencoder_name, latent_channels, pixels_per_latent, step_of_sides
from fewstep.hub.origins import FromPipeline, Origin
from fewstep.networks.inputs import FurtherInputs, SecondSample

#: The name by which networks take their guidance weight.
WEIGHT = "w"

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


class Adapter(nn.Module, FromPipeline):
    """A diffusers model behind the signature of fewstep's networks.

    ``model`` is the diffusers model, ``origin`` the pipeline it came from (None for a bare model), ``size`` the height
    and width of one sample (default: the config's), ``classes`` the number of class labels (None without).

    Further inputs ``[B]`` are added where the model embeds its time; a guidance weight ``w`` the way diffusers has for
    it, where it has one.
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
    #: Names of weights that new inputs brought, which train in full beside low-rank ones.
    trained: tuple[str, ...] = ()

    def __init__(self, model: Any, origin: Origin | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.origin = origin
        self.size = self.config_size() if size is None else size
        #: What adds the further inputs that no network of diffusers has; None without.
        self.further: FurtherInputs | None = None
        #: What adds a second sample; None without.
        self.second: SecondSample | None = None
        #: Whether a call has succeeded.
        self.ran = False
        #: Whether samples are latents, of an autoencoder that may be out of reach.
        self.latent = origin is not None and autoencoder_name(origin.pipe) is not None

    @property
    def guidance_offset(self) -> float:
        """The pipeline's ``guidance_scale`` less the weight ``w`` that the network is given."""
        return 1.0 - self.unguided

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        own = (WEIGHT,) if self.takes_guidance else ()
        return own if self.further is None else (*own, *self.further.spans)

    @property
    def beside_channels(self) -> int:
        return 0 if self.second is None else self.second.channels

    @property
    def entrance(self) -> Any:
        """The convolution that reads the state; None where there is none."""
        return None

    def widened(self, spans: Mapping[str, float], beside: int) -> Adapter:
        """Itself, taking ``spans`` and a second sample too; ValueError where it cannot take one."""
        if beside and self.second is None:
            if not isinstance(self.entrance, nn.Conv2d):
                raise ValueError(f"a {type(self.model).__name__} takes no second sample")
            self.second = SecondSample(beside, self.entrance)
        before = {name for name, _ in self.model.named_parameters()}
        spans = {name: span for name, span in spans.items() if name != WEIGHT or not self.take_weight()}
        new = (name for name, _ in self.model.named_parameters() if name not in before)
        self.trained = (*self.trained, *new)
        if self.further is not None:
            self.further.take(spans)
        elif spans:
            sites = self.time_embeddings()
            self.further = FurtherInputs(spans, sites[0].linear_2.out_features, sites).to(next(self.model.parameters()))
        return self

    def take_weight(self) -> bool:
        """Make the network take a guidance weight the way diffusers has for it, if there is one, as an input that
        changes nothing until it is trained; whether there is."""
        return False

    @abstractmethod
    def time_embeddings(self) -> list[Any]:
        """The modules of diffusers, of one width, that embed the time."""

    def tell(self, extras: Mapping[str, Tensor]) -> None:
        """Hold the further inputs of the coming call; TypeError unless they are all there are."""
        own = dict(extras)
        if self.second is not None:
            self.second.given = own.pop("beside", None)
        if self.further is not None:
            self.further.give(own)
        elif own:
            raise TypeError(f"a {type(self.model).__name__} takes no further inputs, it was given {sorted(own)}")

    @property
    def reads_prompts(self) -> bool:
        """Whether the network's pipeline can make the text part of its condition."""
        return False

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """The condition for ``prompts``, from the text encoders of the network's pipeline, as its own call makes it;
        ValueError for a network that reads no text."""
        raise ValueError(f"a {type(self.model).__name__} reads no prompts")

    def pipeline_class(self) -> Any:
        """The pipeline of diffusers that a plain export goes into; ValueError when the network came without one."""
        if self.origin is None:
            raise ValueError(f"a bare {type(self.model).__name__} has no pipeline to go back into; use load_pipeline")
        return type(self.origin.pipe)

    @property
    def plain(self) -> bool:
        """Whether that pipeline can call the network."""
        return True

    def read_null(self) -> None:
        """Take what the pipeline's guidance leads away from, where it is a text, for no condition."""

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

    @property
    def entrance(self) -> Any:
        return self.model.conv_in

    def time_embeddings(self) -> list[Any]:
        return [self.model.time_embedding]


def as_adapter(net: Any) -> Adapter | None:
    """A network where it is diffusers', None where it is another's."""
    return net if isinstance(net, Adapter) else None


def pipeline_folder(net: Adapter) -> Path | None:
    """The folder of the pipeline that a model came from; None for one that lies in no folder."""
    folder = None if net.origin is None else Path(net.origin.pipe.name_or_path or "").resolve()
    return folder if folder is not None and (folder / "model_index.json").is_file() else None
