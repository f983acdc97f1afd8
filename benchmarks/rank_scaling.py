"""One video on several ranks, on paper: what each computes, sends and holds, and how long that takes at assumed rates.

FLOPs and bytes follow from the shapes. The rates are assumptions: nothing here is measured.

    python -m benchmarks.rank_scaling --preset 14b --tflops 600 --link-gbytes 25
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from wan_autoregressive.models.sequence_parallel import shares
from wan_autoregressive.scripts.costs.formulas import costs_per_chunk
from wan_autoregressive.scripts.costs.sizes import PRESETS, ModelSizes
from wan_autoregressive.scripts.costs.workload import Workload, make_workload

ITEM_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class ChunkOnRanks:
    """A chunk behind a full window on the first of `ranks` ranks, which has most tokens and heads."""

    workload: Workload
    ranks: int

    @property
    def flops(self) -> float:
        """Of the steps and the clean pass. Every rank computes all patches; attention is shared by heads, the rest by
        tokens."""
        workload, config = self.workload, self.workload.model.transformer
        window, tokens, layers = workload.window_tokens, workload.chunk_tokens, workload.model.layers
        assert window is not None
        total = sum(costs.flops for costs in costs_per_chunk(workload, workload.chunks_to_fill).values())
        attentions = workload.steps * layers + layers - 1  # the clean pass ends before its last one
        attention = 4 * tokens * window * workload.model.dim * attentions
        patches = 2 * tokens * config["in_channels"] * 4 * workload.model.dim * (workload.steps + 1)
        by_tokens = (total - attention - patches) * shares(tokens, self.ranks)[0] / tokens
        heads = config["num_attention_heads"]
        return patches + by_tokens + attention * shares(heads, self.ranks)[0] / heads

    @property
    def exchanged_bytes(self) -> int:
        """Sent to others for one layer of one forward: query, key and value, and the way back."""
        to_heads, to_tokens = self._one_tensor_there_and_back
        return 3 * to_heads + to_tokens

    @property
    def gathered_bytes(self) -> int:
        """Sent to others at the end of one forward, in a ring."""
        own_tokens = shares(self.workload.chunk_tokens, self.ranks)[0]
        return own_tokens * (self.ranks - 1) * self.workload.model.channels * 4 * ITEM_BYTES

    @property
    def sent_bytes(self) -> int:
        """Sent to others for the chunk. The clean pass ends with the last layer's keys and values."""
        layers, steps = self.workload.model.layers, self.workload.steps
        to_heads, _ = self._one_tensor_there_and_back
        exchanged = (steps * layers + layers - 1) * self.exchanged_bytes + 2 * to_heads
        return exchanged + steps * self.gathered_bytes

    @property
    def collectives(self) -> int:
        layers, steps = self.workload.model.layers, self.workload.steps
        return steps * (2 * layers + 1) + 2 * layers - 1

    @property
    def _one_tensor_there_and_back(self) -> tuple[int, int]:
        """Bytes sent to others for a tensor of all tokens, and for one on its way back."""
        tokens, heads = self.workload.chunk_tokens, self.workload.model.transformer["num_attention_heads"]
        own_tokens, own_heads = shares(tokens, self.ranks)[0], shares(heads, self.ranks)[0]
        head_bytes = self.workload.model.transformer["attention_head_dim"] * ITEM_BYTES
        return own_tokens * (heads - own_heads) * head_bytes, (tokens - own_tokens) * own_heads * head_bytes

    @property
    def kv_bytes(self) -> int:
        config, window = self.workload.model.transformer, self.workload.window_tokens
        assert window is not None
        heads = shares(config["num_attention_heads"], self.ranks)[0]
        return 2 * self.workload.model.layers * window * heads * config["attention_head_dim"] * ITEM_BYTES

    def seconds(self, flops_per_s: float, bytes_per_s: float, collective_s: float) -> float:
        """Nothing overlaps. Decoding is not in it."""
        waiting = 0.0 if self.ranks == 1 else self.collectives * collective_s
        return self.flops / flops_per_s + self.sent_bytes / bytes_per_s + waiting


def table(preset: str, counts: list[int], tflops: float, link_gbytes: float, collective_us: float) -> str:
    """Markdown, a row for each number of ranks."""
    workload = make_workload(
        **{"model": ModelSizes.of_preset(preset), "height": 480, "width": 832, "dtype": "bfloat16"},
        **{"window_frames": 21, "sink_frames": 3},
    )
    rates = (tflops * 1e12, link_gbytes * 1e9, collective_us * 1e-6)
    alone = ChunkOnRanks(workload, 1)
    lines = [
        "| ranks | TFLOP of a chunk | MB sent, layer and forward | MB sent, chunk | K/V | chunk | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks in counts:
        chunk = ChunkOnRanks(workload, ranks)
        seconds, per_layer = chunk.seconds(*rates), chunk.exchanged_bytes / 1e6
        lines.append(
            f"| {ranks} | {chunk.flops / 1e12:.1f} | {per_layer:.1f} | {chunk.sent_bytes / 1e6:.0f} | "
            f"{chunk.kv_bytes / 2**30:.2f} GiB | {seconds * 1e3:.0f} ms | x{alone.seconds(*rates) / seconds:.2f} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[name for name in PRESETS if name != "demo"], default="1.3b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tflops", type=float, default=600.0, help="assumed, of one device")
    parser.add_argument("--link-gbytes", type=float, default=450.0, help="assumed, GB/s that a rank sends")
    parser.add_argument("--collective-us", type=float, default=20.0, help="assumed, of each collective")
    args = parser.parse_args(words)
    print(table(args.preset, args.ranks, args.tflops, args.link_gbytes, args.collective_us))


if __name__ == "__main__":
    main()
