"""What the models of a video are, and how large things get with them.

A rollout is made of these and knows no pipeline.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from diffusers.video_processor import VideoProcessor

from wan_autoregressive.cache import MovingAverageSink, WanKVCache
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models import CausalWanTransformer3DModel, VideoCodec
from wan_autoregressive.pipelines.frame_grid import FrameGrid, latent_frames_of, pixel_frames_of
from wan_autoregressive.pipelines.prompts import Prompt, PromptState, check_prompt, expand_to_batch
from wan_autoregressive.pipelines.video_frames import as_pil, as_unit_floats
from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.schedulers.step_solver import new_solver

Schedulers = tuple[SelfForcingScheduler, SelfForcingScheduler]
"""Of the first generated chunk, and of all later ones."""


@dataclass(frozen=True)
class Geometry:
    """How pixels, latents and tokens hang together."""

    scale_factor_spatial: int
    """Pixels per latent, in height and in width."""
    scale_factor_temporal: int
    """Pixel frames per latent frame, but for the first, which is one."""
    patch_size: tuple[int, int, int]
    """Latents per token, in time, height and width."""
    latent_channels: int

    @property
    def size_multiples(self) -> tuple[int, int]:
        """Pixels that height and width must be multiples of."""
        return self.scale_factor_spatial * self.patch_size[1], self.scale_factor_spatial * self.patch_size[2]

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of a video of `height` x `width` pixels."""
        return height // self.scale_factor_spatial, width // self.scale_factor_spatial

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of a video of `height` x `width` pixels."""
        rows, columns = self.latent_size(height, width)
        return (rows // self.patch_size[1]) * (columns // self.patch_size[2])

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames that hold `num_frames` pixel frames."""
        return latent_frames_of(num_frames, self.scale_factor_temporal)

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames of the first `latent_frames` of a video."""
        return pixel_frames_of(latent_frames, self.scale_factor_temporal)


class WanTextEncoder:
    """Prompts to embeddings exactly as in `WanPipeline`: padded with zeros, and the padding attended to."""

    _get_t5_prompt_embeds = WanPipeline._get_t5_prompt_embeds

    def __init__(self, tokenizer: Any, text_encoder: torch.nn.Module) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder

    def encode(self, texts: list[str], max_sequence_length: int, device: torch.device) -> torch.Tensor:
        """`(texts, max_sequence_length, text_dim)` on `device`; the encoder runs where it is."""
        return self._get_t5_prompt_embeds(texts, max_sequence_length=max_sequence_length, device=device)


class WanImageEncoder:
    """An image to embeddings exactly as in `WanImageToVideoPipeline`: CLIP's second to last layer."""

    def __init__(self, image_processor: Any, image_encoder: torch.nn.Module) -> None:
        self.image_processor = image_processor
        self.image_encoder = image_encoder

    @property
    def num_tokens(self) -> int:
        """One for each patch, and one for the whole image."""
        config: Any = self.image_encoder.config
        return int((config.image_size // config.patch_size) ** 2 + 1)

    def encode(self, image: Any) -> torch.Tensor:
        """`(1, image_tokens, image_dim)` of an image of any size; the encoder runs where it is."""
        device = get_module_execution_device(self.image_encoder)
        inputs = self.image_processor(images=as_pil(image), return_tensors="pt").to(device)
        return self.image_encoder(**inputs, output_hidden_states=True).hidden_states[-2]


@dataclass(frozen=True)
class WanComponents:
    """The models of a video. A pipeline makes them of its own; a test may make them of anything."""

    transformer: CausalWanTransformer3DModel
    scheduler: SelfForcingScheduler
    codec: VideoCodec | None = None
    """`None` if only latents are asked for."""
    preview_codec: VideoCodec | None = None
    """A second, quicker one for a look at every chunk."""
    text_encoder: WanTextEncoder | None = None
    """`None` if only embeddings are passed."""
    transformer_2: CausalWanTransformer3DModel | None = None
    """The second of a pair of experts (Wan2.2-A14B), for steps below the boundary."""
    boundary_ratio: float | None = None
    """Of a pair, the share of the training timesteps from which `transformer` denoises."""
    image_encoder: WanImageEncoder | None = None
    """For a transformer that attends to an image."""

    @property
    def transformers(self) -> list[CausalWanTransformer3DModel]:
        """One, or two experts: that for high noise and that for low noise."""
        return [self.transformer] if self.transformer_2 is None else [self.transformer, self.transformer_2]

    @property
    def boundary(self) -> float | None:
        """Timestep from which the first of two transformers denoises; `None` with one."""
        if self.transformer_2 is None or self.boundary_ratio is None:
            return None
        return self.boundary_ratio * float(self.scheduler.config.num_train_timesteps)

    @property
    def condition_channels(self) -> int:
        """Input channels beside those of the noisy latents: of a mask and of an image's latents, or 0."""
        config = self.transformer.config
        return config.in_channels - config.out_channels

    @property
    def attends_to_image(self) -> bool:
        """Whether the cross-attention of the transformer sees an image beside the prompt."""
        return self.transformer.config.image_dim is not None

    # Where, and how large.

    @property
    def device(self) -> torch.device:
        """Where the transformer runs, and with it the rollout."""
        return get_module_execution_device(self.transformer)

    @property
    def codec_device(self) -> torch.device:
        """Where the VAE runs."""
        return self.device if self.codec is None else get_module_execution_device(self.codec.vae)

    @property
    def geometry(self) -> Geometry:
        codec, patch_size = self.codec, self.transformer.config.patch_size
        if codec is None:  # of Wan's two VAEs the one with as many channels
            channels = self.transformer.config.out_channels
            return Geometry(16 if channels == 48 else 8, 4, patch_size, channels)
        return Geometry(codec.scale_factor_spatial, codec.scale_factor_temporal, patch_size, codec.latent_channels)

    def tokens_per_frame(self, config: RolloutConfig) -> int:
        """Tokens of one latent frame."""
        return self.geometry.tokens_per_frame(config.height, config.width)

    def frame_grid(self, config: RolloutConfig, given_frames: int = 0) -> FrameGrid:
        """The video's chunks."""
        total = None if config.num_frames is None else self.geometry.latent_frames(config.num_frames)
        first = config.first_chunk_frames or config.chunk_frames
        return FrameGrid(config.chunk_frames, first, given_frames, total, split_at_given=not config.given_in_chunk)

    # What a rollout starts with.

    def schedulers(self, config: RolloutConfig, scheduler_config: dict[str, Any] | None = None) -> Schedulers:
        """Schedulers of one rollout's own; the component is never changed.

        Args:
            scheduler_config: Of a scheduler to use in the place of the component.

        Raises:
            ValueError: steps that the solver or two transformers cannot take.
        """
        later = SelfForcingScheduler.from_config(scheduler_config or self.scheduler.config)
        later.set_timesteps(config.num_inference_steps, denoising_steps=config.denoising_steps)
        first = later
        if config.first_chunk_steps is not None:
            first = SelfForcingScheduler.from_config(later.config)
            first.set_timesteps(denoising_steps=config.first_chunk_steps)
        for scheduler in (first, later):
            new_solver(config.solver, scheduler, self.boundary)  # refuses steps now instead of after some chunks
        return first, later

    def new_kv_cache(self, config: RolloutConfig, total_frames: int | None) -> WanKVCache:
        """An empty cache for one video (one branch of guidance)."""
        per_frame = self.tokens_per_frame(config)
        windowed = config.window_frames is not None
        return WanKVCache(
            num_blocks=len(self.transformer.blocks),
            window_size=config.window_frames * per_frame if config.window_frames is not None else -1,
            sink_size=config.sink_frames * per_frame,
            max_tokens=total_frames * per_frame if total_frames is not None and not windowed else None,
            position_mode=config.position_mode,
            sink_update=MovingAverageSink(config.sink_decay) if config.sink_update == "moving_average" else None,
            kv_dtype=config.kv_dtype,
            bank_frames=config.memory_bank_frames,
            bank_frame_size=per_frame,
        )

    # Text and pixels.

    @torch.no_grad()
    def encode_prompt(self, prompt: Prompt, batch_size: int, max_sequence_length: int = 512) -> PromptState:
        """Embeddings `(batch_size, text_tokens, text_dim)` of a prompt in the transformer's dtype.

        Raises:
            ValueError: neither text nor embeddings, or text without a text encoder.
        """
        check_prompt(prompt, self.transformer.config.text_dim)
        text: list[str] | None = None
        if isinstance(prompt, torch.Tensor):
            embeds = prompt
        else:
            if self.text_encoder is None:
                raise ValueError("this pipeline has no text encoder or tokenizer: pass embeddings instead of text")
            text = [prompt] if isinstance(prompt, str) else list(prompt)
            embeds = self.text_encoder.encode(text, max_sequence_length, self.device)
            text = text * (batch_size // len(text)) if len(text) == 1 else text
        embeds = expand_to_batch(embeds, batch_size).to(self.device, self.transformer.dtype)
        return PromptState(embeds, text)

    def preprocess_pixels(self, video: Any, height: int, width: int) -> torch.Tensor:
        """Frames in any form as `(videos, 3, frames, height, width)` in [-1, 1], resized, where the VAE runs."""
        processor = VideoProcessor(vae_scale_factor=self.geometry.scale_factor_spatial)
        return processor.preprocess_video(as_unit_floats(video), height=height, width=width).to(self.codec_device)

    @torch.no_grad()
    def encode_video(self, video: Any, height: int, width: int, batch_size: int = 1) -> torch.Tensor:
        """Latents `(batch_size, latent_channels, latent_frames, height, width)` of given pixel frames, float32.

        Args:
            video: Frames or a batch of them. They are resized to `height` and `width`; frames past a multiple of 4
                plus 1 are dropped.
        """
        if self.codec is None:
            raise ValueError("this pipeline has no VAE: pass video_latents instead of an image or a video")
        pixels = self.preprocess_pixels(video, height, width)
        factor = self.codec.scale_factor_temporal
        pixels = pixels[:, :, : (pixels.shape[2] - 1) // factor * factor + 1]
        return expand_to_batch(self.encode_pixels(pixels), batch_size, "video")

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents, float32, of a whole video's pixels in [-1, 1], `(batch, 3, frames, height, width)`."""
        assert self.codec is not None
        return self.codec.encoder().encode(pixels.to(self.codec_device)).to(self.device)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1], `(batch, 3, frames, height, width)`, of a whole video's latents."""
        assert self.codec is not None
        return self.codec.decode(latents.to(self.codec_device))
