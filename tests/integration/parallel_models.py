"""One transformer over several ranks: what is run on each of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from wan_autoregressive import CausalWanTransformer3DModel, WanKVCache
from wan_autoregressive.cache import MovingAverageSink
from wan_autoregressive.models import sequence_parallel
from wan_autoregressive.models.sequence_parallel import SequenceParallel
from wan_autoregressive.models.split_weights import held_bytes, split_weights
from wan_autoregressive.models.weights_fingerprint import weights_fingerprint

LAYERS, CHANNELS, HEAD_DIM = 2, 4, 12
TIMESTEPS = (1000.0, 500.0, 0.0)


@dataclass(frozen=True)
class Case:
    """A short video straight through the transformer; sizes in frames."""

    heads: int = 4
    height: int = 8
    width: int = 8
    """Latents; 2 x 2 of them are a token."""
    chunks: tuple[int, ...] = (3,) * 5
    window: int = 8
    sink: int = 2
    batch: int = 1
    per_frame: bool = False
    fused: bool = False
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_frame(self) -> int:
        return self.height // 2 * (self.width // 2)


CASES = {
    "absolute": Case(),
    "relative": Case(cache={"position_mode": "relative"}),
    "sink_relative": Case(cache={"position_mode": "sink_relative"}),
    "moving average sink": Case(cache={"position_mode": "relative", "sink_update": MovingAverageSink(0.5)}),
    "int8": Case(cache={"kv_dtype": "int8"}),
    "int8, relative": Case(cache={"kv_dtype": "int8", "position_mode": "relative"}),
    "int8, sink_relative": Case(cache={"kv_dtype": "int8", "position_mode": "sink_relative"}),
    "no window": Case(window=0, sink=0),
    "batch of 2": Case(batch=2),
    "fused projections": Case(fused=True),
    "a timestep per frame": Case(per_frame=True),
    "a timestep per frame, 4 frames": Case(per_frame=True, chunks=(4,) * 3, window=9, sink=1),
    "tokens do not divide": Case(height=6, width=6, chunks=(3, 2, 1, 3)),
    "heads do not divide": Case(heads=5),
    "neither divides": Case(heads=5, height=6, width=6, batch=2, cache={"position_mode": "sink_relative"}),
    "neither divides, int8, a timestep per frame": Case(
        **{"heads": 5, "height": 6, "width": 10, "per_frame": True, "chunks": (1, 3, 3, 2, 3)},
        cache={"kv_dtype": "int8", "position_mode": "relative"},
    ),
    "fewer tokens than ranks": Case(height=2, width=2, chunks=(1,) * 4, window=3, sink=1),
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_model(heads: int = 4, layers: int = LAYERS, head_dim: int = HEAD_DIM) -> CausalWanTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CausalWanTransformer3DModel(
            **{"num_attention_heads": heads, "attention_head_dim": head_dim, "ffn_dim": 64, "num_layers": layers},
            **{"text_dim": 16, "freq_dim": 32, "in_channels": CHANNELS, "out_channels": CHANNELS},
        ).eval()
        for parameter in model.parameters():  # gates and modulation that let attention through
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def flows(model: CausalWanTransformer3DModel, case: Case) -> tuple[torch.Tensor, WanKVCache]:
    """Of every forward, `(forwards, batch, channels, frames, height, width)` flattened, and the cache at the end."""
    cache = WanKVCache(
        num_blocks=len(model.blocks),
        window_size=case.window * case.tokens_per_frame or -1,
        sink_size=case.sink * case.tokens_per_frame,
        **case.cache,
    )
    text, found, start = randn(case.batch, 5, 16), [], 0
    for index, frames in enumerate(case.chunks):
        for step, timestep in enumerate(TIMESTEPS):
            cache.enable_append_mode() if step == 0 else cache.enable_overwrite_mode()
            latents = randn(case.batch, CHANNELS, frames, case.height, case.width, seed=10 * index + step)
            times = torch.full((case.batch, frames if case.per_frame else 1), timestep)
            times -= torch.arange(times.shape[1]) * (timestep / 10)
            output = model(latents, times, text, attention_kwargs={"kv_cache": cache}, frame_offset=start).sample
            found.append(output.flatten())
        start += frames
    return torch.cat(found), cache


def prepared(case: Case) -> CausalWanTransformer3DModel:
    model = small_model(case.heads)
    if case.fused:
        model.fuse_qkv_projections()
    return model


class Sent:
    """Counts what this rank sends to others by the exchange of tokens and heads."""

    def __init__(self) -> None:
        self.exchanges = self.bytes = self.gathers = 0

    def __enter__(self) -> "Sent":
        real = sequence_parallel.collectives

        class Counting:
            AsyncCollectiveTensor = real.AsyncCollectiveTensor

            @staticmethod
            def all_to_all_single(x, received, sent, group):
                self.exchanges += 1
                self.bytes += (sum(sent) - sent[dist.get_rank(group)]) * x.element_size()
                return real.all_to_all_single(x, received, sent, group)

            @staticmethod
            def all_gather_single(x, dim, group):
                self.gathers += 1
                return real.all_gather_single(x, dim, group)

        self._real, sequence_parallel.collectives = real, Counting
        return self

    def __exit__(self, *error: object) -> None:
        sequence_parallel.collectives = self._real


def run_cases(names: list[str]) -> dict[str, dict[str, Any]]:
    """For each case the flows on this rank, the bytes of its cache and what it sent."""
    found = {}
    for name in names:
        model = prepared(CASES[name])
        model.set_sequence_parallel(dist.group.WORLD)
        with Sent() as sent:
            output, cache = flows(model, CASES[name])
        expected = model.kv_cache_bytes(0, CASES[name].batch, cache) if CASES[name].window else None
        found[name] = {
            **{"flows": output, "cache_bytes": cache.allocated_bytes, "expected_bytes": expected},
            **{"exchanges": sent.exchanges, "sent_bytes": sent.bytes, "gathers": sent.gathers},
        }
    return found


def exchange_there_and_back() -> list[tuple[bool, bool]]:
    """For some sizes whether tokens come back as they went, and whether what arrived is the own heads of all."""
    group, found = dist.group.WORLD, []
    for heads, tokens, batch in ((4, 12, 1), (5, 7, 2), (3, 1, 1), (4, 3, 3)):
        parallel = SequenceParallel(group, heads)
        whole = [randn(batch, tokens, heads, 6, seed=seed) for seed in (1, 2, 3)]
        arrived = parallel.to_heads(tokens, *(parallel.shard(x) for x in whole))
        back = [parallel.to_tokens(x) for x in arrived]
        gathered = [parallel.gather(x.flatten(2), tokens) for x in back]
        found.append(
            (
                all(torch.equal(x, parallel.of_own_heads(y)) for x, y in zip(arrived, whole, strict=True)),
                all(torch.equal(x, y.flatten(2)) for x, y in zip(gathered, whole, strict=True)),
            )
        )
    return found


# Deliberate mistakes, each of which has to show.


def _heads_in_another_order(parallel: SequenceParallel) -> None:
    right = parallel.to_tokens
    parallel.to_tokens = lambda x: right(x.flip(2))


def _tokens_shifted_by_one(parallel: SequenceParallel) -> None:
    right = parallel.to_heads
    parallel.to_heads = lambda n, *tensors: tuple(x.roll(1, 1) for x in right(n, *tensors))


def _one_number_off(parallel: SequenceParallel) -> None:
    right = parallel.to_heads

    def to_heads(num_tokens, *tensors):
        key, value, *query = right(num_tokens, *tensors)
        value = value.clone()
        value[:, 0, 0, 0] += 1e-2
        return key, value, *query

    parallel.to_heads = to_heads


def _frames_of_own_tokens(parallel: SequenceParallel) -> None:
    parallel.shard_groups = lambda x, num_tokens: x  # as if own tokens were all frames, each with fewer tokens


MISTAKES = {
    "heads in another order on the way back": (_heads_in_another_order, Case()),
    "tokens shifted by one before the cache": (_tokens_shifted_by_one, Case()),
    "one number of the values off": (_one_number_off, Case()),
    "modulation by frame over own tokens": (
        _frames_of_own_tokens,
        Case(height=6, width=8, chunks=(4,) * 3, window=9, sink=1, per_frame=True),
    ),
}


def run_mistakes() -> dict[str, torch.Tensor]:
    found = {}
    for name, (spoil, case) in MISTAKES.items():
        model = prepared(case)
        model.set_sequence_parallel(dist.group.WORLD)
        spoil(model.parallel)
        found[name] = flows(model, case)[0]
    return found


def errors() -> list[str]:
    """What is refused, in its words."""
    found = []
    single = dist.new_group([0])
    for group, heads in ((dist.group.WORLD, 1), (single, 4)):
        try:
            small_model(heads).set_sequence_parallel(group)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def model_launch(names: list[str]) -> dict[str, Any]:
    return {
        "there_and_back": exchange_there_and_back(),
        "cases": run_cases(names),
        "mistakes": run_mistakes(),
        "errors": errors(),
    }


def split_weights_launch() -> dict[str, Any]:
    """FSDP2 alone and with the exchange on the same ranks."""
    case, found, whole = CASES["sink_relative"], {}, small_model(layers=4)
    found["whole"] = weights_fingerprint(whole), held_bytes(whole)
    for name, group in (("alone", None), ("with the exchange", dist.group.WORLD)):
        model = small_model(layers=4)
        model.set_sequence_parallel(group)
        split_weights(model, dist.group.WORLD)
        fingerprint = found["whole"][0]
        output, cache = flows(model, case)
        if dist.get_rank() == 0:  # alone, as where a video is saved: known already, or it would wait for the others
            fingerprint = weights_fingerprint(model)
        found[name] = {"flows": output, "cache_bytes": cache.allocated_bytes, "held": held_bytes(model)}
        found[name]["fingerprint"] = fingerprint
    return found


def compiled_launch(options: dict[str, Any]) -> dict[str, Any]:
    """Compiled blocks with the exchange in them: the graphs of each, and what the video becomes."""
    from test_compile import count_graphs_by_block, rollout_latents, tiny_model

    frames = {"num_frames": 4 * (3 * 5 - 1) + 1, **options}
    model = tiny_model()
    model.set_sequence_parallel(dist.group.WORLD)
    eager = rollout_latents(model, **frames)
    graphs = count_graphs_by_block(model)  # with fullgraph: a break is an error
    return {"eager": eager, "compiled": rollout_latents(model, **frames), "graphs": graphs}
