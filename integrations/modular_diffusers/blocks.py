"""Text, rollout, loop over chunks, decoding: the four blocks of a video, as `diffusers.ModularPipelineBlocks`.

They carry `model_name = "wan"`, so that `init_pipeline` gives a `WanModularPipeline` and Wan's own blocks fit between
them: its text encoder in front, its VAE decoder behind, any block of one's own after each chunk.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, UMT5EncoderModel

from wan_autoregressive.configs.choices import OutputType
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.codec import codec_of
from wan_autoregressive.pipelines.components import WanTextEncoder
from wan_autoregressive.pipelines.pipeline_wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.pipelines.video_frames import cut_frames, join_frames, pixels_as

GENERATOR = InputParam("generator", description="`torch.Generator`, or one for each video.")
PROMPT_EMBEDS = "`(batch, text_tokens, text_dim)`"


class WanAutoregressiveTextEncoderStep(ModularPipelineBlocks):
    """Prompts to embeddings as Wan's own block makes them, without a guider: negative ones only for guidance."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Encodes the prompt; with `guidance_scale` above 1 the negative prompt too."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("text_encoder", UMT5EncoderModel), ComponentSpec("tokenizer", AutoTokenizer)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt", type_hint=str | list[str], required=True, description="What to show."),
            InputParam("negative_prompt", type_hint=str | list[str], description="What to avoid; nothing by default."),
            _setting("guidance_scale"),
            _setting("max_sequence_length"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        kinds = {"type_hint": torch.Tensor, "kwargs_type": "denoiser_input_fields", "description": PROMPT_EMBEDS}
        return [OutputParam("prompt_embeds", **kinds), OutputParam("negative_prompt_embeds", **kinds)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        given = self.get_block_state(state)
        encoder = WanTextEncoder(components.tokenizer, components.text_encoder)

        def encoded(prompt: str | list[str]) -> torch.Tensor:
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            return encoder.encode(texts, given.max_sequence_length, components._execution_device)

        given.prompt_embeds, given.negative_prompt_embeds = encoded(given.prompt), None
        if given.guidance_scale > 1:
            negative = given.negative_prompt or ""
            given.negative_prompt_embeds = encoded(
                [negative] * len(given.prompt_embeds) if isinstance(negative, str) else negative
            )
        self.set_block_state(state, given)
        return components, state


class WanAutoregressivePrepareStep(ModularPipelineBlocks):
    """Starts the video: checks every input before a model runs, encodes given frames, makes caches and noise."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Makes the rollout, which holds everything of one video: KV cache, noise, sampler, prompts to come."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("transformer", WanTransformer3DModel),
            ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler),
            ComponentSpec("vae", AutoencoderKLWan),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        tensor = {"type_hint": torch.Tensor}
        return [
            InputParam("prompt_embeds", required=True, description=PROMPT_EMBEDS, **tensor),
            InputParam("negative_prompt_embeds", description=f"{PROMPT_EMBEDS}, for guidance.", **tensor),
            InputParam("num_videos_per_prompt", type_hint=int, default=1),
            GENERATOR,
            InputParam("latents", description="Initial noise `(batch, channels, frames, height, width)`.", **tensor),
            InputParam("image", description="One image to start from."),
            InputParam("video", description="A clip to go on from; with `strength` the source of video to video."),
            InputParam("video_latents", description="Given latents, normalised, as `latents`.", **tensor),
            InputParam(
                "prompt_schedule",
                type_hint=dict[int, torch.Tensor],
                description=f"Embeddings {PROMPT_EMBEDS} by the latent frame from which they hold.",
            ),
            InputParam(
                "attention_kwargs", type_hint=dict, description="Passed to the transformer; `scale` is LoRA's."
            ),
            *(_setting(field.name) for field in _FIELDS.values()),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("rollout", type_hint=WanRollout, description="The video in the making.")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        given = self.get_block_state(state)
        pipeline = WanAutoregressivePipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=components.transformer,
            vae=components.vae,
            scheduler=components.scheduler,
        )
        values = {name: value for name, value in given.as_dict().items() if value is not None}
        if not {"num_frames", "latents", "strength"} & values.keys():
            values["num_frames"] = 81  # as the pipeline: the loop has to end
        given.rollout = pipeline.rollout(output_type="latent", **values)
        given.num_frames = given.rollout.config.num_frames
        self.set_block_state(state, given)
        return components, state


class WanKeepLatentsStep(ModularPipelineBlocks):
    """The one block that the loop over chunks needs: keeps what it made. Others may stand before or after it."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Keeps the latents of the `WanVideoChunk` that the loop has just made, `block_state.chunk`."

    def __call__(self, components: Any, block_state: Any, k: int) -> tuple[Any, Any]:
        block_state.latent_chunks.append(block_state.chunk.latents)
        return components, block_state


class WanAutoregressiveDenoiseStep(LoopSequentialPipelineBlocks):
    """Chunk after chunk against the rolling KV cache, until the video is done.

    Blocks in `sub_blocks` are called after each chunk as `block(components, block_state, k=number of the chunk)`, with
    the chunk in `block_state.chunk`; they may set a prompt for the next one (`block_state.rollout.set_prompt`) or stop
    after this one (`block_state.rollout.interrupt()`).
    """

    model_name = "wan"
    block_classes = [WanKeepLatentsStep]  # noqa: RUF012
    block_names = ["keep_latents"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Denoises the video chunk by chunk; each sub-block runs after each chunk."

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [InputParam("rollout", required=True, type_hint=WanRollout)]

    @property
    def loop_intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", type_hint=torch.Tensor, description="Clean, of the whole video."),
            OutputParam("chunk_lengths", type_hint=list[int], description="Latent frames of each chunk."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        rollout = block_state.rollout
        block_state.latent_chunks = []
        with self.progress_bar(total=rollout.grid.total_frames) as bar:
            for k, block_state.chunk in enumerate(rollout.chunks()):
                components, block_state = self.loop_step(components, block_state, k=k)
                bar.update(rollout.frames_done - bar.n)
        block_state.latents = torch.cat(block_state.latent_chunks, dim=2)
        block_state.chunk_lengths = [latents.shape[2] for latents in block_state.latent_chunks]
        self.set_block_state(state, block_state)
        return components, state


class WanAutoregressiveDecodeStep(ModularPipelineBlocks):
    """Decodes in the chunks in which the video was made: the memory of a chunk, and no seam between them."""

    model_name = "wan"

    @property
    def description(self) -> str:
        return "Decodes latents with the streaming VAE; takes latents of any block."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderKLWan)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor, description="Clean, normalised."),
            InputParam(
                "chunk_lengths", type_hint=list[int], description="Latent frames decoded at once; 3 by default."
            ),
            _setting("num_frames"),
            InputParam(
                "output_type", type_hint=OutputType, default="np", description="`np`, `pt`, `pil` or `latent`."
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("videos", description="As `frames` of `WanAutoregressivePipeline`.")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        given = self.get_block_state(state)
        if given.output_type == "latent":
            given.videos = given.latents
        else:
            pieces = given.latents.split(given.chunk_lengths or 3, dim=2)
            decoder = codec_of(components.vae).decoder()
            frames = [
                pixels_as(given.output_type, decoder.decode(piece.to(components.vae.device))) for piece in pieces
            ]
            given.videos = cut_frames(join_frames(frames), given.num_frames)
        self.set_block_state(state, given)
        return components, state


class WanAutoregressiveBlocks(SequentialPipelineBlocks):
    """The four blocks in order: `WanAutoregressiveBlocks().init_pipeline(folder)`."""

    model_name = "wan"
    block_classes = [  # noqa: RUF012
        WanAutoregressiveTextEncoderStep,
        WanAutoregressivePrepareStep,
        WanAutoregressiveDenoiseStep,
        WanAutoregressiveDecodeStep,
    ]
    block_names = ["text_encoder", "prepare", "denoise", "decode"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Text, image or video to video of any length, chunk by chunk with a rolling KV cache."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam.template("videos")]


_FIELDS: Mapping[str, "dataclasses.Field[Any]"] = {
    field.name: field for field in dataclasses.fields(RolloutConfig) if field.name != "output_type"
}


def _setting(name: str) -> InputParam:
    """A field of [`RolloutConfig`], where it is explained, as an input; its default is that of the config."""
    field = _FIELDS[name]
    default = None if field.default is dataclasses.MISSING else field.default
    return InputParam(name, type_hint=field.type, default=default, description=f"`RolloutConfig.{name}`")
