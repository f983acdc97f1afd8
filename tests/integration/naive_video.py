"""Videos made the slow way, to compare with: one forward of diffusers' own transformer over every frame, past ones
too, in which each frame is told whom it sees, where in time, and which prompt it reads. No cache, no masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline

CHANNELS, TEXT_DIM = 16, 16
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "ffn_dim": 32,
    "num_layers": 2,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
}


@dataclass
class Frame:
    """A frame of a forward."""

    latents: torch.Tensor
    """`(batch, channels, 1, height, width)`"""
    timestep: float
    position: int
    """Its temporal rotary position as a query."""
    sees: dict[int, int]
    """Numbers in the forward of the frames that it attends to, and their positions."""
    prompt: int = 0


@dataclass
class NaiveTransformer:
    """diffusers' `WanTransformer3DModel` and a causal one with the same random weights."""

    rope_max_seq_len: int = 1024
    prompts: list[torch.Tensor] = field(default_factory=list)
    """`(batch, text_tokens, text_dim)` each."""
    seed: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    """That differ from `SIZES`."""
    image: torch.Tensor | None = None
    """`(batch, image_tokens, image_dim)` that cross-attention sees beside the prompt."""
    guidance: tuple[float, int] | None = None
    """Its scale, and the number of the prompt that it goes away from."""

    def __post_init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.stock = WanTransformer3DModel(**{**SIZES, **self.sizes}).eval()
        _make_frames_depend_on_each_other(self.stock)
        config = {**self.stock.config, "rope_max_seq_len": self.rope_max_seq_len}
        self.causal = CausalWanTransformer3DModel.from_config(config).eval()
        self.causal.load_state_dict(self.stock.state_dict())
        self.frames: Sequence[Frame] = ()
        for block in self.stock.blocks:
            block.attn1.set_processor(_SelfAttention(self))
            block.attn2.set_processor(_CrossAttention(self))

    def pipeline(self, steps: Sequence[float], vae: AutoencoderKLWan | None = None) -> WanAutoregressivePipeline:
        scheduler = SelfForcingScheduler(denoising_steps=steps)
        pipe = WanAutoregressivePipeline(None, None, self.causal, vae, scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def flow(self, frames: Sequence[Frame]) -> torch.Tensor:
        """Of all frames, `(batch, channels, frames, height, width)`."""
        if self.guidance is None:
            return self._flow(frames)
        scale, negative = self.guidance
        away = self._flow([replace(frame, prompt=negative) for frame in frames])
        return away + scale * (self._flow(frames) - away)

    def _flow(self, frames: Sequence[Frame]) -> torch.Tensor:
        self.frames = frames
        latents = torch.cat([frame.latents for frame in frames], dim=2)
        size = latents.shape[3] * latents.shape[4] // 4
        timesteps = torch.tensor([[frame.timestep for frame in frames for _ in range(size)]] * latents.shape[0])
        return self.stock(latents, timesteps, torch.cat(self.prompts, dim=1), self.image, return_dict=False)[0]


def _make_frames_depend_on_each_other(model: WanTransformer3DModel) -> None:
    """With weights as they are drawn a frame that is not seen, or seen elsewhere, would hardly change the others."""
    with torch.no_grad():
        for block in model.blocks:
            attn = block.attn1
            for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], attn.norm_q):
                layer.weight *= 2
            block.scale_shift_table *= 2
        model.proj_out.weight *= 4


def rotated(tokens: torch.Tensor, position: int, columns: int) -> torch.Tensor:
    """Tokens `(batch, tokens, heads, head_dim)` of one frame, row by row, with Wan's rotary embedding."""
    count, dim = tokens.shape[1], tokens.shape[3]
    spatial = 2 * (dim // 6)
    places = torch.arange(count)
    parts = ((dim - 2 * spatial, torch.full((count,), position)), (spatial, places // columns))
    angles = [
        place[:, None].double() / 10000.0 ** (torch.arange(0, size, 2).double() / size)
        for size, place in (*parts, (spatial, places % columns))
    ]
    turn = torch.polar(torch.ones(count, dim // 2).double(), torch.cat(angles, dim=1))[None, :, None]
    pairs = torch.view_as_complex(tokens.double().unflatten(3, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(3).to(tokens.dtype)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


class _SelfAttention:
    def __init__(self, owner: NaiveTransformer) -> None:
        self.owner = owner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        frames = self.owner.frames
        columns = frames[0].latents.shape[4] // 2
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).chunk(len(frames), 1)
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)).chunk(len(frames), 1)
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).chunk(len(frames), 1)
        out = []
        for frame, own in zip(frames, query, strict=True):
            keys = torch.cat([rotated(key[number], place, columns) for number, place in frame.sees.items()], dim=1)
            values = torch.cat([value[number] for number in frame.sees], dim=1)
            out.append(attention(rotated(own, frame.position, columns), keys, values))
        return attn.to_out[0](torch.cat(out, dim=1))


class _CrossAttention:
    def __init__(self, owner: NaiveTransformer) -> None:
        self.owner = owner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        frames = self.owner.frames
        image_tokens = 0 if self.owner.image is None else self.owner.image.shape[1]
        image, texts = encoder_hidden_states[:, :image_tokens], encoder_hidden_states[:, image_tokens:]
        texts = texts.chunk(len(self.owner.prompts), dim=1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).chunk(len(frames), 1)
        out = []
        for frame, own in zip(frames, query, strict=True):
            key = attn.norm_k(attn.to_k(texts[frame.prompt])).unflatten(2, (attn.heads, -1))
            value = attn.to_v(texts[frame.prompt]).unflatten(2, (attn.heads, -1))
            seen = attention(own, key, value)
            if image_tokens:
                image_key = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, (attn.heads, -1))
                seen = seen + attention(own, image_key, attn.add_v_proj(image).unflatten(2, (attn.heads, -1)))
            out.append(seen)
        return attn.to_out[0](torch.cat(out, dim=1))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
