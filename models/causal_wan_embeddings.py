"""Positions, timesteps and text as a causal Wan transformer embeds them."""

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import Timesteps, get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTimeTextImageEmbedding

from wan_autoregressive.cache.rotary import RotaryEmbedding


class CausalWanRotaryPosEmbed(WanRotaryPosEmbed):
    """Rotary tables for frames that start at `frame_offset` instead of 0."""

    def forward(self, hidden_states: torch.Tensor, frame_offset: int = 0) -> RotaryEmbedding:
        """cos and sin, each `(1, frames * height * width, 1, head_dim)` after patching; of every pair of channels the
        first has -sin, which upstream does not look at.

        Args:
            hidden_states: `(batch, channels, frames, height, width)`. For its shape.
            frame_offset: Position of the first frame, counted after patching.

        Raises:
            ValueError: a position outside the table (`rope_max_seq_len` of the config).
        """
        frames, height, width = (n // p for n, p in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        return self.at([(frame_offset, frame_offset + frames)], height, width)

    def at(self, positions: Sequence[tuple[float, float]], height: int, width: int) -> RotaryEmbedding:
        """cos and sin of frames at the given runs of temporal positions `[start, stop)`, `height` x `width` each.

        Whole numbers are looked up in the table and end with it. Floats are computed: they may lie between frames and
        have no end.
        """
        times = [self._time_tables(start, stop) for start, stop in positions]
        cos = self._lay_out(self.freqs_cos, torch.cat([cos for cos, _ in times]), height, width)
        sin = self._lay_out(self.freqs_sin, torch.cat([sin for _, sin in times]), height, width)
        sin[..., ::2].neg_()
        return cos, sin

    def rotation(self, frames: float) -> RotaryEmbedding:
        """cos and sin that move keys by some frames in time, forward or back."""
        cos, sin = self.at([(abs(frames), abs(frames) + 1)], 1, 1)
        return cos, sin if frames >= 0 else -sin

    def _time_tables(self, start: float, stop: float) -> RotaryEmbedding:
        """cos and sin of one run of temporal positions, `(frames, t_dim)`."""
        if isinstance(start, int) and isinstance(stop, int):
            if start < 0 or stop > self.max_seq_len:
                raise ValueError(
                    f"frames {start} to {stop - 1} leave the rotary table of {self.max_seq_len} positions "
                    "(rope_max_seq_len). Absolute positions end there; relative ones do not"
                )
            return self.freqs_cos[start:stop, : self.t_dim], self.freqs_sin[start:stop, : self.t_dim]
        device = self.freqs_cos.device
        # As upstream makes the table.
        precise = torch.float32 if torch.backends.mps.is_available() else torch.float64
        frames = torch.arange(round(stop - start), dtype=precise, device=device) + start
        return get_1d_rotary_pos_embed(self.t_dim, frames, use_real=True, freqs_dtype=precise)

    def _lay_out(self, table: torch.Tensor, time: torch.Tensor, height: int, width: int) -> torch.Tensor:
        _, row, column = table.split([self.t_dim, self.h_dim, self.w_dim], dim=1)
        frames = time.shape[0]
        grid = (frames, height, width, -1)
        time = time.view(frames, 1, 1, -1).expand(grid)
        row = row[:height].view(1, height, 1, -1).expand(grid)
        column = column[:width].view(1, 1, width, -1).expand(grid)
        return torch.cat([time, row, column], dim=-1).reshape(1, frames * height * width, 1, -1)


class CausalWanTimesteps(Timesteps):
    """Sinusoidal timestep embedding with a choice of precision.

    diffusers computes it in float32; the original Wan code in float64, which brings latents from 1.2e-5 to 2e-6 of
    the original's.
    """

    sinusoid_dtype = torch.float32

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self.sinusoid_dtype == torch.float32:
            return super().forward(timesteps)
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=self.sinusoid_dtype, device=timesteps.device) / half
        angles = timesteps[:, None].to(self.sinusoid_dtype) * torch.pow(10000, -exponent)  # (timesteps, half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class CausalWanTimeTextImageEmbedding(WanTimeTextImageEmbedding):
    """Upstream's, but each part is computed only where it is asked for."""

    def forward(
        self,
        timestep: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        encoder_hidden_states_image: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Time embedding `(batch, groups, dim)` in `dtype`, modulation `(batch, groups, 6, dim)`, text behind image
        `(batch, tokens, dim)`.

        Args:
            timestep: `(batch, groups)`, or `None` for no embedding and no modulation.
            encoder_hidden_states: `(batch, text_tokens, text_dim)`, or `None` for no text.
        """
        temb = modulation = None
        if timestep is not None:
            sinusoid = self.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)
            embedder_dtype = next(self.time_embedder.parameters()).dtype
            if sinusoid.dtype != embedder_dtype and embedder_dtype != torch.int8:
                sinusoid = sinusoid.to(embedder_dtype)
            temb = self.time_embedder(sinusoid).to(dtype)
            # A copy: torch.compile tells views from tensors of their own, as it is when it is kept for later.
            modulation = self.time_proj(self.act_fn(temb)).unflatten(2, (6, -1)).clone()
        if encoder_hidden_states is not None:
            encoder_hidden_states = self.text_embedder(encoder_hidden_states)
            if encoder_hidden_states_image is not None:
                image = self.image_embedder(encoder_hidden_states_image)
                encoder_hidden_states = torch.concat([image, encoder_hidden_states], dim=1)
        return temb, modulation, encoder_hidden_states
