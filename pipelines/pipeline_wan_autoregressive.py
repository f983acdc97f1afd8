"""The pipeline: from a prompt to a video that grows chunk by chunk."""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Unpack

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging, replace_example_docstring
from diffusers.video_processor import VideoProcessor
from transformers import AutoTokenizer, CLIPVisionModel, UMT5EncoderModel

from wan_autoregressive.configs.choices import OutputType
from wan_autoregressive.configs.rollout_config import RolloutConfig, RolloutSettings
from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.models.codec import codec_of
from wan_autoregressive.pipelines.checkpoint_index import STOCK_CLASSES, swap_component_classes
from wan_autoregressive.pipelines.components import WanComponents, WanImageEncoder, WanTextEncoder
from wan_autoregressive.pipelines.decode_alongside import check_decode_alongside
from wan_autoregressive.pipelines.image_condition import encode_image_condition
from wan_autoregressive.pipelines.inferred_sizes import given_latent_frames, pixel_frames, pixel_size
from wan_autoregressive.pipelines.input_checks import (
    check_experts,
    check_extensions,
    check_image,
    check_pair,
    check_preview,
    check_prompts,
    check_sizes,
    check_tensors,
)
from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.prompts import Prompt, PromptState, check_one_of, prompt_count
from wan_autoregressive.pipelines.rollout import StepCallback, WanRollout
from wan_autoregressive.pipelines.rollout_estimate import RolloutEstimate, estimate_rollout
from wan_autoregressive.pipelines.source_video import SourceVideo
from wan_autoregressive.pipelines.step_callback import StepEndFunction, VideoStepCallback
from wan_autoregressive.pipelines.video_frames import cut_frames, join_frames, pixels_as
from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.schedulers.self_forcing_scheduler import Generators

logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> import torch
        >>> from diffusers.utils import export_to_video
        >>> from wan_autoregressive import WanAutoregressivePipeline
        >>> # A folder made by `wan-ar convert self_forcing_dmd.pt --base Wan2.1-T2V-1.3B-Diffusers --output DIR`
        >>> pipe = WanAutoregressivePipeline.from_pretrained("DIR", dtype=torch.bfloat16).to("cuda")
        >>> video = pipe("a fox runs through fresh snow", num_frames=81).frames[0]
        >>> export_to_video(video, "fox.mp4", fps=16)
        >>> for chunk in pipe.stream("a fox runs through fresh snow", window_frames=12, sink_frames=3):
        ...     show(chunk.frames)  # endless; stop when you like
        ```
"""


class RolloutMaker(Protocol):
    """A class of rollouts, or what makes them."""

    def __call__(self, *args: Any, **kwargs: Any) -> WanRollout: ...
    def load(
        self,
        components: WanComponents,
        folder: str | os.PathLike[str],
        generator_device: torch.device | str | None = None,
        on_step_end: StepCallback | None = None,
    ) -> WanRollout: ...


class WanAutoregressivePipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Text, image or video to video of any length, with a Wan model distilled for causal few-step generation.

    The pipeline holds components and nothing of a video; that is in a [`WanRollout`].

    Args:
        tokenizer, text_encoder: As in `WanPipeline`. May be `None` if only embeddings are passed.
        transformer: A plain `WanTransformer3DModel` is turned into one in place.
        vae: May be `None` if only latents are asked for.
        scheduler: Another scheduler is replaced by one with its flow shift.
        transformer_2: Wan2.2-A14B's second expert, for the steps below the boundary, with caches of its own;
            `transformer` then makes those above.
        boundary_ratio: Where the two meet, as a share of the training timesteps; that of the folder.
        image_encoder, image_processor: For a transformer that attends to an image (Wan2.1-I2V).

    Raises:
        ValueError: a boundary without a second transformer or the other way round, or one of another size.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->transformer_2->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012
    _optional_components = [  # noqa: RUF012
        *("tokenizer", "text_encoder", "vae", "transformer_2", "image_encoder", "image_processor")
    ]

    rollouts: RolloutMaker = WanRollout
    """What `rollout` and `resume` make, and how."""

    # Text is encoded exactly as in WanPipeline: padded with zeros to max_sequence_length, and the padding attended to.
    encode_prompt = WanPipeline.encode_prompt
    _get_t5_prompt_embeds = WanPipeline._get_t5_prompt_embeds

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        transformer: CausalWanTransformer3DModel | WanTransformer3DModel,
        vae: AutoencoderKLWan,
        scheduler: SelfForcingScheduler,
        transformer_2: CausalWanTransformer3DModel | WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        image_encoder: CLIPVisionModel | None = None,
        image_processor: Any = None,
    ) -> None:
        super().__init__()
        transformer, transformer_2 = _as_causal(transformer), _as_causal(transformer_2)
        if isinstance(scheduler, SchedulerMixin) and not isinstance(scheduler, SelfForcingScheduler):
            scheduler = SelfForcingScheduler.from_config(scheduler.config)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            transformer_2=transformer_2,
            vae=vae,
            scheduler=scheduler,
            image_encoder=image_encoder,
            image_processor=image_processor,
        )
        # Saved folders name stock classes, so that they load from the Hub and in WanPipeline; loading swaps them back.
        stock = {name: named for name, named in STOCK_CLASSES.items() if getattr(self, name) is not None}
        self.register_to_config(**stock, boundary_ratio=boundary_ratio)
        components = self.wan_components()
        check_pair(components)
        geometry = components.geometry
        self.vae_scale_factor_temporal = geometry.scale_factor_temporal
        self.vae_scale_factor_spatial = geometry.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Load a stock Wan folder into our classes. Raises `ValueError` for a folder of another model."""
        return super().extract_init_dict(swap_component_classes(config_dict), **kwargs)

    # Generating.

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepEndFunction | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int = 512,
        decode_alongside: bool = False,
        **rollout_kwargs: Any,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate a whole video. The same frames as [`stream`], joined.

        Args:
            prompt: What to show; a list makes one video for each.
            negative_prompt: What to avoid; used with `guidance_scale` above 1.
            height, width: Pixels; 480 x 832 by default, or the size of `latents` or `video_latents`. Multiples of the
                VAE's and the patch's sizes together (16).
            num_frames: Pixel frames, any count; 81 by default, or as many as `latents` gives. The last chunk takes the
                remainder and surplus frames are cut.
            num_inference_steps: Evenly spaced denoising steps per chunk instead of the scheduler's list.
            guidance_scale: Above 1, classifier-free guidance with a second cache. Distilled models are made for 1.
            num_videos_per_prompt: Videos per prompt.
            generator: Noise and re-noise are drawn chunk by chunk, step by step, as (batch, channels, frames, height,
                width).
            latents: `(batch, channels, frames, height, width)`. Initial noise of the chunks to generate.
            prompt_embeds, negative_prompt_embeds: `(batch, text_tokens, text_dim)`. Instead of text.
            output_type: `np`, `pil`, `pt` or `latent`.
            return_dict: Whether to return a [`WanPipelineOutput`] or a tuple.
            attention_kwargs: Passed to the transformer; `scale` is the LoRA scale.
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)` after every denoising step, counted over
                all chunks. `latents` is the whole video, frames to come being zero.
            callback_on_step_end_tensor_inputs: Of `latents` (default), `prompt_embeds`, `negative_prompt_embeds`.
            max_sequence_length: Text tokens, padding included.
            decode_alongside: Decode a chunk while the next one is denoised, see [`WanRollout.chunks`]. Without effect
                where nothing is decoded chunk by chunk: for latents, and with `callback_on_step_end`. Not with
                offloaded models.
            rollout_kwargs: Chunks, window, sink, given frames and prompt changes, see [`rollout`].

        Examples:

        Returns:
            [`WanPipelineOutput`] or `tuple`: `frames` as `(batch, frames, height, width, 3)` for `np`, `(batch,
            frames, 3, height, width)` for `pt`, lists of images for `pil`, `(batch, channels, latent_frames, height,
            width)` for `latent`.

        Raises:
            ValueError: arguments that cannot work, before any model runs.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        tensor_inputs = callback_on_step_end_tensor_inputs or ["latents"]
        self._check_callback_inputs(tensor_inputs)
        if decode_alongside:
            check_decode_alongside(self.wan_components())
        self._guidance_scale = guidance_scale
        self._interrupt = False

        # 1. The rollout: inputs checked, prompt encoded
        callback = None
        if callback_on_step_end is not None:
            callback = VideoStepCallback(self, callback_on_step_end, tensor_inputs)
        # Swapping transformer and VAE for every chunk is slow, and a callback may change any frame until the end.
        decode_at_end = callback is not None or self._offloads_whole_models
        if num_frames is None and latents is None and rollout_kwargs.get("strength") is None:
            num_frames = 81
        rollout = self.rollout(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type="latent" if decode_at_end else output_type,
            attention_kwargs=attention_kwargs,
            max_sequence_length=max_sequence_length,
            on_step_end=callback,
            **rollout_kwargs,
        )

        # 2. Its chunks
        self._num_timesteps = rollout.num_steps
        chunks = list(self._stream(rollout, decode_alongside))

        # 3. The video
        latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
        if callback is not None and callback.latents is not None:
            latents = callback.latents[:, :, : latents.shape[2]]
        if output_type == "latent":
            frames = latents
        elif decode_at_end:
            frames = cut_frames(self.decode_latents(latents, output_type), rollout.config.num_frames)
            self.maybe_free_model_hooks()
        else:
            frames = join_frames([chunk.frames for chunk in chunks])
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def stream(
        self, prompt: str | list[str] | None = None, *, decode_alongside: bool = False, **kwargs: Any
    ) -> Iterator[WanVideoChunk]:
        """Generate a video as an iterator over its chunks, each handed out as soon as it is decoded.

        Args: those of [`rollout`], and `decode_alongside`, see [`WanRollout.chunks`]. Without `num_frames` (and
            `latents`) it does not end.

        Yields:
            [`WanVideoChunk`] with `frames`, `latents`, `index`, `start_frame` and `timings`.
        """
        if decode_alongside:
            check_decode_alongside(self.wan_components())
        rollout = self.rollout(prompt, **kwargs)
        if self._offloads_whole_models and rollout.vae_decoder is not None:
            logger.warning("model offload swaps transformer and VAE for every chunk of a stream, which is slow")
        return self._stream(rollout, decode_alongside)

    @torch.no_grad()
    def rollout(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        *,
        image: Any = None,
        video: Any = None,
        video_latents: torch.Tensor | None = None,
        prompt_schedule: Mapping[int, Prompt] | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        on_step_end: StepCallback | None = None,
        preview_vae: torch.nn.Module | None = None,
        **settings: Unpack[RolloutSettings],
    ) -> WanRollout:
        """Start a video that the caller drives with `step()`.

        Arguments that [`__call__`] has too mean the same here; without `num_frames` (and `latents`) there is no end.

        Args:
            image: One image (PIL, array or tensor) to start from. A transformer that is conditioned on an image
                (Wan2.1-I2V, Wan2.2-I2V-A14B) needs one and generates all frames; a clip may be given beside it.
            video: A clip to extend: frames (PIL images, `(frames, height, width, 3)` uint8 or [0, 1] floats, tensors)
                or a batch of such. Frames past a multiple of 4 plus 1 are dropped. With `strength` it is not given but
                the source, frame by frame (any iterable, a camera too): every chunk starts from the noised encoding of
                the matching source chunk, and the video ends with the source.
            video_latents: `(batch, channels, frames, height, width)`. Given latents, normalised. Given frames come
                first in the video and count in `num_frames`.
            prompt_schedule: Prompts or embeddings by the latent frame from which they hold; taken over at the next
                chunk boundary.
            on_step_end: Called as `f(rollout, chunk, step, timestep, latents)` after every denoising step, `step`
                counting over all chunks; returns the latents to go on with.
            preview_vae: A second VAE that decodes every chunk first, for a live view beside frames of full quality:
                `chunk.preview`, and [`WanRollout.on_preview`] before the full VAE begins. With `output_type="latent"`
                it is the only one.
            settings: The fields of a [`RolloutConfig`]: chunks, window, sink, steps, positions, prompt changes.

        Returns:
            [`WanRollout`]

        Raises:
            ValueError: arguments that cannot work, before any model runs.
            TypeError: an argument that there is not.
        """
        # 1. Check inputs
        schedule, components = dict(prompt_schedule or {}), self._with_preview(preview_vae)
        condition_image = image if components.condition_channels else None
        image = None if components.condition_channels else image
        check_one_of(image=image, video=video, video_latents=video_latents)
        if settings.get("strength") is not None and video is None:
            raise ValueError("strength is for video to video; pass the source as video")
        source, geometry = video if settings.get("strength") is not None else None, components.geometry
        factor = geometry.scale_factor_temporal
        given_frames = 0 if source is not None else given_latent_frames(image, video, video_latents, factor)
        height, width = pixel_size(
            settings.get("height"), settings.get("width"), geometry.scale_factor_spatial, latents, video_latents
        )
        resolved: dict[str, Any] = {**settings, "height": height, "width": width}
        config = RolloutConfig(**resolved)
        frames_before = components.frame_grid(config, given_frames).first_generated_frame
        num_frames = pixel_frames(config.num_frames, latents, frames_before, source, factor)
        config = dataclasses.replace(config, num_frames=num_frames)
        first_prompt = check_one_of(prompt=prompt, prompt_embeds=prompt_embeds)
        if first_prompt is None:
            first_prompt = check_one_of(required=True, prompt=schedule.pop(0, None), prompt_embeds=None)
        negative = check_one_of(negative_prompt=negative_prompt, negative_prompt_embeds=negative_prompt_embeds)
        negative = "" if negative is None else negative
        check_extensions(config)
        check_experts(components, config)
        check_sizes(components, config, given_frames)
        check_image(components, condition_image)
        check_preview(components)
        schedulers = components.schedulers(config)
        check_prompts(components, config, [first_prompt, negative, *schedule.values()], list(schedule))
        batch_size = prompt_count(first_prompt) * num_videos_per_prompt
        check_tensors(components, config, batch_size, given_frames, latents, video_latents, generator)

        # 2. Encode prompts
        def encoded(prompt: Prompt) -> PromptState:
            return components.encode_prompt(prompt, batch_size, config.max_sequence_length)

        started = time.perf_counter()
        first_state = encoded(first_prompt)
        negative_embeds = encoded(negative).embeds if config.do_classifier_free_guidance else None
        states = {frame: encoded(later) for frame, later in schedule.items()}
        text_s = time.perf_counter() - started

        # 3. Encode given frames
        started = time.perf_counter()
        condition = None
        if condition_image is not None:
            total_frames = components.frame_grid(config).total_frames
            condition = encode_image_condition(components, condition_image, height, width, batch_size, total_frames)
        if video_latents is None and given_frames:
            given = [image] if video is None else video
            video_latents = components.encode_video(given, height, width, batch_size)
        encode_s = time.perf_counter() - started

        device = components.device
        return self.rollouts(
            components,
            config,
            prompt=first_state,
            negative_prompt_embeds=negative_embeds,
            prompt_schedule=states,
            generator=generator,
            latents=None if latents is None else latents.to(device, torch.float32),
            given_latents=None if video_latents is None else video_latents.to(device, torch.float32),
            source=None if source is None else SourceVideo(components, source, height, width, batch_size),
            attention_kwargs=attention_kwargs,
            on_step_end=on_step_end,
            seconds_before={"text": text_s, "encode": encode_s},
            schedulers=schedulers,
            image=condition,
        )

    def resume(
        self,
        folder: str | os.PathLike[str],
        generator_device: torch.device | str | None = None,
        on_step_end: StepCallback | None = None,
        preview_vae: torch.nn.Module | None = None,
    ) -> WanRollout:
        """Go on with a video that [`WanRollout.save`] wrote to `folder`: on the same kind of device every further
        chunk is the same to the bit as if it had never been interrupted.

        Args:
            folder: Where it was saved. It is only read.
            generator_device: Where its generators shall live if not where they did; of the same kind (another GPU,
                say). A video without generators goes on with torch's global state.
            on_step_end: As for [`rollout`], since a function cannot be saved.
            preview_vae: As for [`rollout`], if the video has had one; it may be left out.

        Raises:
            ValueError: nothing was saved there, it is damaged or of another format version, or this pipeline's models
                have other weights, another config, dtype or tiling. The message names the difference.
        """
        return self.rollouts.load(self._with_preview(preview_vae), folder, generator_device, on_step_end)

    def estimate(self, given_frames: int = 0, batch_size: int = 1, **settings: Any) -> RolloutEstimate:
        """What a rollout with these settings will take, without running anything.

        Args:
            given_frames: Given latent frames.
            batch_size: Videos made together.
            settings: The fields of a [`RolloutConfig`]; `height` and `width` are needed.
        """
        return estimate_rollout(self.wan_components(), RolloutConfig(**settings), given_frames, batch_size)

    plan = estimate
    """The name that `estimate` had before."""

    # What rollouts are made of.

    def wan_components(self) -> WanComponents:
        """The models as they are now, for a rollout: one that runs keeps those that it was started with."""
        text = self.tokenizer is not None and self.text_encoder is not None
        sees_image = self.image_processor is not None and self.image_encoder is not None
        return WanComponents(
            transformer=self.transformer,
            scheduler=self.scheduler,
            codec=None if self.vae is None else codec_of(self.vae),
            text_encoder=WanTextEncoder(self.tokenizer, self.text_encoder) if text else None,
            image_encoder=WanImageEncoder(self.image_processor, self.image_encoder) if sees_image else None,
            transformer_2=self.transformer_2,
            boundary_ratio=self.config.boundary_ratio,
        )

    def _with_preview(self, preview_vae: torch.nn.Module | None) -> WanComponents:
        components = self.wan_components()
        if preview_vae is None:
            return components
        return dataclasses.replace(components, preview_codec=codec_of(preview_vae))

    def encode_video(self, video: Any, height: int, width: int, batch_size: int = 1) -> torch.Tensor:
        """Normalised latents `(batch_size, channels, latent_frames, height, width)` of given pixel frames.

        Args:
            video: Frames or a batch of them, see [`rollout`]. They are resized to `height` and `width`; frames past a
                multiple of 4 plus 1 are dropped.
        """
        return self.wan_components().encode_video(video, height, width, batch_size)

    def decode_latents(self, latents: torch.Tensor, output_type: OutputType = "np") -> Any:
        """Pixels of a whole video's normalised latents `(batch, channels, latent_frames, height, width)`."""
        return pixels_as(output_type, self.wan_components().decode_latents(latents))

    # diffusers' conventions.

    @property
    def guidance_scale(self) -> float:
        """Of the last `__call__`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the last `__call__` had guidance."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the last `__call__`, over all chunks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked the last `__call__` to stop."""
        return self._interrupt

    # Inputs.

    def _check_callback_inputs(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}; allowed are {self._callback_tensor_inputs}"
            )

    # Loops.

    def _stream(self, rollout: WanRollout, decode_alongside: bool) -> Iterator[WanVideoChunk]:
        """The chunks of a rollout under a progress bar that counts denoising steps."""
        endless = rollout.grid.total_frames is None
        bar = self.progress_bar(iter(())) if endless else self.progress_bar(total=rollout.num_steps)
        with bar as progress_bar:
            rollout.on_progress = progress_bar.update
            try:
                yield from rollout.chunks(decode_alongside)
            finally:
                rollout.on_progress = None
                self.maybe_free_model_hooks()

    @property
    def _offloads_whole_models(self) -> bool:
        """Whether model offload (not group or sequential offload) swaps components in and out."""
        return bool(getattr(self, "_all_hooks", None))


def _as_causal(transformer: Any) -> Any:
    """A stock transformer turned into ours in place; anything else as it is."""
    if isinstance(transformer, WanTransformer3DModel) and not isinstance(transformer, CausalWanTransformer3DModel):
        return CausalWanTransformer3DModel.from_wan(transformer)
    return transformer
