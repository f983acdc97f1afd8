"""A pipeline whose videos are made by several ranks: rank 0 makes them as if it were alone, the others do their part.

```python
# torchrun --nproc-per-node 4 script.py
dist.init_process_group()
pipe = WanAutoregressivePipeline.from_pretrained(folder, dtype=torch.bfloat16).to(f"cuda:{local_rank}")
with parallel_rollouts(pipe) as leads:
    if leads:  # everything that makes videos: pipe(), pipe.stream(), pipe.rollout(), pipe.resume()
        for chunk in pipe.stream("a fox runs", generator=torch.Generator().manual_seed(7), window_frames=12):
            show(chunk.frames)
```
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch.distributed as dist

from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.parallel_rollout import ParallelRollouts
from wan_autoregressive.pipelines.pipeline_wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.pipelines.ranks import RankGroup
from wan_autoregressive.pipelines.remote_codec import DecoderServer, RemoteCodec, check_same_codec


@contextmanager
def parallel_rollouts(
    pipe: WanAutoregressivePipeline, decode_on_last: bool = False, timeout_s: float = 60.0
) -> Iterator[bool]:
    """Make the videos of a pipeline on all ranks of `torch.distributed`, each of which enters this with the same
    models.

    Yields whether this is rank 0, which makes the videos within the block. The others do their part at the end of
    theirs, until rank 0 leaves its own.

    Args:
        decode_on_last: The last rank only decodes what rank 0 asks for, and takes no part in forwards. With
            `decode_alongside` it decodes a chunk while the others denoise the next one.
        timeout_s: Seconds after which a rank that is waited for counts as gone. A first chunk that is compiled may
            need more.

    Raises:
        ValueError: fewer heads than ranks, no second rank to decode, or VAEs that differ.
        RankFailedError: another rank failed or is gone; the message names it.
    """
    components, last = pipe.wan_components(), dist.get_world_size() - 1
    if decode_on_last and (last == 0 or components.codec is None):
        raise ValueError("decode_on_last needs a VAE, and a rank beside the first one")
    # Every rank makes all groups, since torch counts them.
    forwards = RankGroup(list(range(last if decode_on_last else last + 1)), timeout_s)
    decoding = RankGroup([0, last], timeout_s) if decode_on_last else None
    if not forwards.is_member:
        yield False
        assert decoding is not None
        assert components.codec is not None
        check_same_codec(components.codec, decoding.ranks)
        DecoderServer(components.codec, components.codec_device, decoding).serve()
        return
    for transformer in components.transformers:
        transformer.set_sequence_parallel(forwards.group)
    rollouts, before = ParallelRollouts(forwards.ranks), pipe.rollouts
    try:
        if forwards.ranks.leads:
            with forwards.ranks, nullcontext() if decoding is None else decoding.ranks:
                rollouts.codec = None if decoding is None else _remote_codec(components, decoding)
                pipe.rollouts = rollouts
                yield True
        else:
            yield False
            rollouts.follow(components)
    finally:
        pipe.rollouts = before
        for transformer in components.transformers:
            transformer.set_sequence_parallel(None)


def _remote_codec(components: WanComponents, decoding: RankGroup) -> RemoteCodec:
    assert components.codec is not None
    check_same_codec(components.codec, decoding.ranks)
    return RemoteCodec(components.codec, decoding)
