"""Layers of Wan with fewer passes over memory: the same bits as upstream's, without gradients."""

import torch
from diffusers.models.activations import GELU


class InPlaceGELU(GELU):
    """Works in the memory of its projection, the widest tensor of a block."""

    def gelu(self, gate: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().gelu(gate)
        return torch.ops.aten.gelu_(gate, approximate=self.approximate)


class InPlaceRMSNorm(torch.nn.RMSNorm):
    """Works in the memory of a projection on the CPU, for which PyTorch has no fused kernel."""

    _TOKENS_AT_ONCE = 256
    """So few that their squares are still in the CPU's cache when they are summed up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.eps is None or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        if torch.compiler.is_compiling():  # which fuses it, and has one graph for any number of tokens
            return super().forward(x)
        for tokens in x.split(self._TOKENS_AT_ONCE, dim=-2):
            scale = tokens.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
            tokens.mul_(scale).mul_(self.weight)
        return x
