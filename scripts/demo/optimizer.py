"""Muon for matrices and convolution kernels, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
orthogonal one; with the scale of Liu et al. 2025 (https://arxiv.org/abs/2502.16982) the size of its updates matches
AdamW's, so one learning rate serves both. On these small models it needs a half to a third of AdamW's steps.
"""

from collections.abc import Iterable

import torch
from torch import nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
# The iteration bears bfloat16, which is faster only where the CPU multiplies such matrices itself.
_PRECISION = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Matrix (rows, columns) -> one of the same shape with singular values near 1."""
    a, b, c = _NEWTON_SCHULZ
    x = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).to(_PRECISION)
    x = x / (x.norm() + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on parameters of two and more dimensions, AdamW on vectors and on the tables named in `plain`.

    Args:
        named_parameters: what to train.
        learning_rate: of both kinds; the training loop scales it through `param_groups`.
        plain: parts of parameter names that are not linear maps (modulation tables), hence AdamW's.
        momentum, betas, eps: as in the two methods.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        learning_rate: float,
        plain: tuple[str, ...] = ("scale_shift_table",),
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        kernels: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            is_map = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 1
            (kernels if is_map and not any(part in name for part in plain) else vectors).append(parameter)
        groups = [{"params": kernels, "muon": True}, {"params": vectors, "muon": False}]
        super().__init__(groups, {"lr": learning_rate, "momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                rule = self._muon if group["muon"] else self._adamw
                update = rule(self.state[parameter], parameter.grad, group)
                parameter.add_(update, alpha=-group["lr"])

    def _muon(self, state: dict, gradient: torch.Tensor, group: dict) -> torch.Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        nesterov = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
        return (orthogonalize(nesterov) * 0.2 * max(nesterov.shape) ** 0.5).view(gradient.shape)

    def _adamw(self, state: dict, gradient: torch.Tensor, group: dict) -> torch.Tensor:
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].lerp_(gradient.square(), 1 - beta2)
        mean = state["mean"] / (1 - beta1 ** state["step"])
        square = state["square"] / (1 - beta2 ** state["step"])
        return mean / (square.sqrt() + group["eps"])
