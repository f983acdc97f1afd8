"""Weights that are too large for one device, split over those of a group (PyTorch's FSDP2).

Each rank holds its share of every block and gathers a block's weights for the time of its forward. This goes together
with `set_sequence_parallel` over the same ranks, whose forwards meet block by block anyway.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.models.weights_fingerprint import weights_fingerprint


def split_weights(
    transformer: CausalWanTransformer3DModel, group: dist.ProcessGroup, device_type: str | None = None
) -> None:
    """Keep a share of a transformer's weights on this rank, in place; each rank of the group calls it.

    LoRA layers are loaded or fused before. Between forwards a rank holds its shares, and at the peak of one two blocks
    more.

    Args:
        transformer: With the same whole weights on all ranks.
        device_type: Where the shares go, `cuda` say, if the weights are not there yet.
    """
    mesh = DeviceMesh.from_group(group, device_type or transformer.device.type)
    for block in transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True)
    weights_fingerprint(transformer)  # it takes all ranks, and a video is saved and resumed by one of them


def held_bytes(transformer: torch.nn.Module) -> int:
    """Bytes of the weights that this rank holds."""
    return sum(own_share(parameter).nbytes for parameter in transformer.parameters())


def own_share(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: all of it unless it is split."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
