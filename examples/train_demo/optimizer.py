"""Muon for matrices and convolution kernels, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
orthogonal one; with the scale of Liu et al. 2025 (https://arxiv.org/abs/2502.16982) the size of its updates matches
AdamW's, so one learning rate serves both. On these small models it needs a half to a third of AdamW's steps.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW:
    """`torch.optim.Muon` on parameters of two and more dimensions, AdamW on vectors and what is named in `plain`.

    Muon takes matrices only, so it works on copies of the kernels as (outputs, everything else); kernels may have any
    memory format.

    Args:
        named_parameters: what to train.
        learning_rate: of both kinds; see `set_learning_rate`.
        plain: parts of parameter names that are not linear maps (modulation tables), hence AdamW's.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        learning_rate: float,
        plain: tuple[str, ...] = ("scale_shift_table",),
    ) -> None:
        kernels: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            is_map = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 1
            (kernels if is_map and not any(part in name for part in plain) else vectors).append(parameter)
        self._matrices = [(kernel, kernel.detach().flatten(1).clone()) for kernel in kernels]
        self._muon = torch.optim.Muon(
            [matrix for _, matrix in self._matrices], learning_rate, weight_decay=0, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(vectors, learning_rate, betas=(0.9, 0.95), weight_decay=0)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next steps."""
        for group in (*self._muon.param_groups, *self._adamw.param_groups):
            group["lr"] = learning_rate

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients of the parameters."""
        for kernel, matrix in self._matrices:
            matrix.copy_(kernel.flatten(1))
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        self._muon.step()
        for kernel, matrix in self._matrices:
            kernel.copy_(matrix.view_as(kernel))
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Momenta of both, for `load_state_dict`."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
