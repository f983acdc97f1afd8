"""Keys or values in one byte per number, with a scale per token and head."""

import torch

from wan_autoregressive.cache.token_buffer import TokenBuffer, put_in

_LARGEST = 127


def quantize(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to 255 levels, the largest number of each token and head being ±127.

    The scale is `max |x| / 127` in the dtype of the tokens, and at least that dtype's smallest normal number, so that
    zeros stay zeros. In that dtype rather than in float32 it takes the fewest bytes and scales back without a wider
    copy of the window; numbers are rounded against the scale as it is kept, so its own rounding costs nothing.

    Args:
        tokens: `(batch, tokens, heads, head_dim)`. float32, bfloat16 or float16.

    Returns:
        int8 values shaped as `tokens`, and scales `(batch, tokens, heads, 1)` in the dtype of `tokens`.
        `|values * scales - tokens| <= scales / 2`, beside the rounding of the product to that dtype. A token and head
        with an inf or NaN in it comes back as NaN.
    """
    scales = tokens.abs().amax(dim=-1, keepdim=True) / _LARGEST
    scales = scales.clamp_min(torch.finfo(tokens.dtype).tiny)
    values = (tokens / scales.float()).round_()
    return values.to(torch.int8), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The tokens `(batch, tokens, heads, head_dim)` of `quantize`, in the dtype of the scales; the only new memory."""
    return values.to(scales.dtype).mul_(scales)


class Int8Buffer(TokenBuffer):
    """Keys or values of one block as int8 values `(batch, capacity, heads, head_dim)` and scales `(…, 1)`.

    Attention sees the newest chunk as it was computed and the past as it is kept. A chunk's own numbers weigh most and
    are there anyway: taking them costs nothing, and a first chunk or a re-cache of everything is exact to the bit.
    """

    encode = staticmethod(quantize)
    decode = staticmethod(dequantize)

    @staticmethod
    def slot_bytes(head_dim: int, dtype: torch.dtype) -> int:
        return head_dim + dtype.itemsize

    def tokens(self) -> torch.Tensor:
        """All slots in the dtype of the tokens: a copy."""
        return self.decode(*self.parts)

    def attended(self, slots: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
        """All slots with `newest` itself in `slots`: a copy, to be dropped after its attention."""
        return put_in(self.tokens(), slots, newest)

    def seen(self, past: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The slots `past` in the dtype of the tokens, and `own` as it was given behind them: a copy."""
        values, scales = self.parts
        return torch.cat([self.decode(values.index_select(1, past), scales.index_select(1, past)), own], dim=1)
