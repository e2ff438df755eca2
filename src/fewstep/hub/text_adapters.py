"""Diffusers text models as networks: what is special in the call of each."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditions import Cond
from fewstep.hub.adapters import Adapter, UNetAdapter
from fewstep.hub.autoencoders import pixels_per_latent
from fewstep.hub.origins import Origin
from fewstep.hub.requires import require
from fewstep.networks.parts import zeroed


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

    @torch.no_grad()
    def read_null(self) -> None:
        if self.reads_prompts:
            self.set_null(self.embed_null())

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


#: The width of the embedding of a guidance weight that a U-Net is made to take, that of the LCM authors' script.
WEIGHT_EMBEDDING = 256


class UNet2DCondition(UNetAdapter, TextAdapter):
    """UNet2DConditionModel: Stable Diffusion 1 and 2, SDXL with its pooled embedding and sizes, LCM, LDM, Kandinsky,
    inpainting and other conditions on pictures.

    ``w`` ``[B]`` is the guidance weight of LCM-style students (models with ``time_cond_proj_dim``); it is the
    pipelines' ``guidance_scale - 1`` and takes the place of the condition ``guidance_scale``.
    """

    unguided = 0.0

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

    def take_weight(self) -> bool:
        layer = self.model.time_embedding.linear_1
        self.model.register_to_config(time_cond_proj_dim=WEIGHT_EMBEDDING)
        made = zeroed(nn.Linear(WEIGHT_EMBEDDING, layer.in_features, bias=False))
        self.model.time_embedding.cond_proj = made.to(layer.weight)
        self.takes_guidance, self.guidance = True, guidance_of(self.origin, 8.5)
        return True

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, w: Tensor | None = None, **extras: Tensor) -> Tensor:
        given = self.conditions(cond, x)
        width = self.model.config.time_cond_proj_dim
        if w is not None and width is None:
            raise ValueError(f"a network without time_cond_proj_dim was called with w={w}")
        if w is None and width is not None:
            w = self.guidance_scale(given, x) - 1
        self.tell(extras)
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

    @property
    def entrance(self) -> Any:
        return self.model.pos_embed.proj

    def time_embeddings(self) -> list[Any]:
        return [self.model.time_text_embed.timestep_embedder]

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> Tensor:
        given = self.conditions(cond, x)
        self.tell(extras)
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

    def take_weight(self) -> bool:
        model = self.model
        old = model.time_text_embed
        config = model.config
        made = type_with_guidance()(
            embedding_dim=old.timestep_embedder.linear_2.out_features,
            pooled_projection_dim=config.pooled_projection_dim,
        ).to(old.timestep_embedder.linear_2.weight)
        made.time_proj, made.timestep_embedder, made.text_embedder = (
            old.time_proj, old.timestep_embedder, old.text_embedder,
        )  # fmt: skip
        zeroed(made.guidance_embedder.linear_2)
        model.register_to_config(guidance_embeds=True)
        model.time_text_embed, self.takes_guidance = made, True
        return True

    def time_embeddings(self) -> list[Any]:
        return [self.model.time_text_embed.timestep_embedder]

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, w: Tensor | None = None, **extras: Tensor) -> Tensor:
        given = self.conditions(cond, x)
        self.tell(extras)
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

    @property
    def clock(self) -> float:
        return float(self.model.config.timestep_scale)

    def needs(self) -> dict[str, tuple[int | None, ...]]:
        return {"prompt_embeds": (None, self.model.config.caption_channels), **super().needs()}

    def optional(self) -> dict[str, tuple[int | None, ...]]:
        return {"prompt_attention_mask": (None,), **super().optional()}

    @property
    def entrance(self) -> Any:
        return self.model.patch_embed.proj

    def time_embeddings(self) -> list[Any]:
        return [self.model.time_embed.emb.timestep_embedder]

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> Tensor:
        given = self.conditions(cond, x)
        self.tell(extras)
        out = self.called(
            self.with_concat(x, given),
            encoder_hidden_states=given["prompt_embeds"],
            encoder_attention_mask=given.get("prompt_attention_mask"),
            timestep=t * self.clock,
        )
        return out[:, : x.shape[1]]

    def embed(self, prompts: list[str], **given: Any) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.encoded(prompts, **given)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def embed_null(self) -> dict[str, Tensor]:
        """The empty prompt without the instruction that the pipeline writes before prompts."""
        return self.embed([""], complex_human_instruction=None)


def type_with_guidance() -> Any:
    """Flux's embedding of time, guidance and pooled text."""
    module = require("diffusers.models.embeddings", "networks of diffusers")
    return module.CombinedTimestepGuidanceTextProjEmbeddings


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
