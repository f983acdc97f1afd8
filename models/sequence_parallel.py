"""One forward over the ranks of a process group: in self-attention each has some heads, elsewhere some tokens.

All sizes follow from the number of tokens, heads and ranks, so that no rank ever asks another for one. The exchange is
that of DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509). Keys and values are exchanged before they are cached: a
rank's cache holds its own heads of the whole window, and of a chunk only its own tokens are ever sent, never the past.

With `S` tokens, `d` channels and `b` bytes for each number, a rank of `N` sends for one video and self-attention
`4 S d b (N - 1) / N^2` bytes where tokens and heads divide: `3 / 4` of it are query, key and value, the rest is what
attention made of them. At the end of a forward the output is gathered, `S c b (N - 1) / N` more for `c` channels. This
module knows nothing of caches or of Wan.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives  # compiled forwards keep them in their graphs
import torch.nn.functional as F


class SequenceParallel:
    """This rank's part in the forwards of a group.

    Args:
        group: Every rank of it makes the same forwards with the same inputs.
        num_heads: Of the model. Where they do not divide, the first ranks have one more.

    Raises:
        ValueError: this process is not in the group, or there are fewer heads than ranks.
    """

    def __init__(self, group: dist.ProcessGroup, num_heads: int) -> None:
        self.group = group
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"this process, rank {dist.get_rank()}, is not in the group that shares the forwards")
        if num_heads < self.num_ranks:
            raise ValueError(
                f"{num_heads} heads cannot be shared by {self.num_ranks} ranks; use {num_heads} at most, and the "
                "others for decoding or for other videos"
            )
        self.heads = shares(num_heads, self.num_ranks)
        """Of each rank."""
        self.own_heads = self.heads[self.rank]

    # Tokens.

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        """Own tokens of `(batch, tokens, …)`: a copy, since a compiled block makes another graph for a view."""
        return x.split(shares(x.shape[1], self.num_ranks), dim=1)[self.rank].clone(
            memory_format=torch.contiguous_format
        )

    def shard_groups(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """What holds for groups of own tokens, from `(batch, groups, …)` for groups of all `num_tokens`.

        Each of the groups given is `num_tokens / groups` consecutive tokens; those returned are smaller where a given
        one is on two ranks, so that all of them are of one size.
        """
        if x.shape[1] == 1:
            return x
        size = num_tokens // x.shape[1]
        sizes = shares(num_tokens, self.num_ranks)
        start, count = sum(sizes[: self.rank]), sizes[self.rank]
        own_size = math.gcd(size, start, count)
        return x.repeat_interleave(size // own_size, dim=1).narrow(1, start // own_size, count // own_size)

    def gather(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """`(batch, num_tokens, channels)` of all ranks, from own tokens `(batch, own tokens, channels)`."""
        sizes = shares(num_tokens, self.num_ranks)
        padded = F.pad(x, (0, 0, 0, sizes[0] - x.shape[1])).transpose(0, 1).contiguous()  # the first has the most
        of_ranks = _finished(collectives.all_gather_single(padded, 0, self.group)).split(sizes[0])
        return torch.cat([rank[:size] for rank, size in zip(of_ranks, sizes, strict=True)]).transpose(0, 1)

    # Heads.

    def to_heads(self, num_tokens: int, *of_tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(batch, num_tokens, own heads, head_dim)` each, from `(batch, own tokens, heads, head_dim)`; one exchange
        for all of them."""
        x = torch.stack(of_tokens, dim=2).transpose(0, 1)  # (own tokens, batch, tensors, heads, head_dim)
        own_tokens, batch, count, _, head_dim = x.shape
        parts = [part.flatten() for part in x.split(self.heads, dim=3)]
        unit = batch * count * head_dim
        received = [tokens * self.own_heads * unit for tokens in shares(num_tokens, self.num_ranks)]
        x = self._exchange(torch.cat(parts), received, [own_tokens * heads * unit for heads in self.heads])
        return x.view(num_tokens, batch, count, self.own_heads, head_dim).transpose(0, 1).unbind(2)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, own tokens, heads, head_dim)`, from `(batch, tokens, own heads, head_dim)`: the way back."""
        batch, num_tokens, own_heads, head_dim = x.shape
        sizes = shares(num_tokens, self.num_ranks)
        own_tokens, unit = sizes[self.rank], batch * head_dim
        received = [own_tokens * heads * unit for heads in self.heads]
        sent = [tokens * own_heads * unit for tokens in sizes]
        parts = self._exchange(x.transpose(0, 1).flatten(), received, sent).split(received)
        shapes = [(own_tokens, batch, heads, head_dim) for heads in self.heads]
        of_ranks = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return torch.cat(of_ranks, dim=2).transpose(0, 1)

    def of_own_heads(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """Own heads of a tensor that has all of them along `dim`: a view."""
        return x.split(self.heads, dim)[self.rank]

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same to the bit on each, of what own heads give: in place."""
        dist.all_reduce(x, group=self.group)
        return x

    # What is saved as one: of whole models, in the memory of the first rank.

    def join_heads(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """On the first rank all heads of what every rank has its own of, on the CPU; on the others `x` as it is."""
        if self.rank:
            dist.send(x.contiguous(), group=self.group, group_dst=0)
            return x
        whole = x.new_empty(*x.shape[:dim], sum(self.heads), *x.shape[dim + 1 :], device="cpu")
        for rank, part in enumerate(whole.split(self.heads, dim)):
            got = x
            if rank:
                got = torch.empty(part.shape, dtype=x.dtype, device=x.device)
                dist.recv(got, group=self.group, group_src=rank)
            part.copy_(got)
        return whole

    def split_heads(self, x: torch.Tensor, dim: int, device: torch.device) -> torch.Tensor:
        """Own heads, on `device`, of what the first rank has whole; on the others `x` tells the shape."""
        parts = x.split(self.heads, dim)
        if self.rank:
            got = torch.empty(parts[self.rank].shape, dtype=x.dtype, device=device)
            dist.recv(got, group=self.group, group_src=0)
            return got
        for rank, part in enumerate(parts[1:], start=1):
            dist.send(part.to(device).contiguous(), group=self.group, group_dst=rank)
        return parts[0].to(device).contiguous()

    def _exchange(self, x: torch.Tensor, received: Sequence[int], sent: Sequence[int]) -> torch.Tensor:
        return _finished(collectives.all_to_all_single(x, list(received), list(sent), self.group))


def shares(total: int, num_ranks: int) -> list[int]:
    """What each rank has of `total` tokens or heads: as even as can be, the first ones having one more."""
    return [total // num_ranks + (rank < total % num_ranks) for rank in range(num_ranks)]


def _finished(x: torch.Tensor) -> torch.Tensor:
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x
