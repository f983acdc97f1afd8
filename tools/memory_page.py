"""Writes `docs/MEMORY.md` from what `wan-ar estimate` computes: `python tools/memory_page.py`."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

from wan_autoregressive.scripts import estimate
from wan_autoregressive.scripts.costs.memory import estimate_memory
from wan_autoregressive.scripts.costs.workload import workload_of
from wan_autoregressive.scripts.run_report import human_bytes

PAGE = Path(__file__).parents[1] / "docs" / "MEMORY.md"
CARDS = (8, 12, 16, 24, 32, 80)
"""GiB."""
USABLE = 0.9
"""Share of a card; the rest is left for what the estimate does not count."""

MODELS = {
    "Wan2.1-T2V-1.3B, 480x832": "--preset 1.3b --height 480 --width 832",
    "Wan2.2-TI2V-5B, 704x1280": "--preset 5b --height 704 --width 1280",
    "Wan2.1-T2V-14B, 480x832": "--preset 14b --height 480 --width 832",
    "Wan2.2-T2V-A14B, 480x832": "--preset a14b --height 480 --width 832",
}
SETTINGS = {
    "nothing": "",
    "tiny VAE": "--tiny-vae",
    "tiny VAE, int8 weights and past": "--tiny-vae --weights int8 --kv-dtype int8",
    "tiny VAE, Q4_0 weights, int8 past": "--tiny-vae --weights q4_0 --kv-dtype int8",
}
_COMMON = "--dtype bfloat16 --window-frames 12 --sink-frames 3"


_WAYS = {"all models on it": "all", "text encoder off it": "no text encoder", "model offload": "one at a time"}
_PAGE = """\
# What fits which card

Computed by `wan-ar estimate`, tried on no card; `python tools/memory_page.py` writes this page. One video in bfloat16
without guidance, a window of 12 latent frames with a sink of 3, chunks of 3. What the figures mean and what they leave
out says [PERFORMANCE.md](PERFORMANCE.md#memory-computed); a tenth of a card is left free for that.

| card | {models} |
|---|{rule}|
{summary}
The first that fits, from nothing on: what is set, and where the models are. *Text encoder off it*: it takes 10.58 GiB
in bfloat16; encode the prompts first or on the CPU and pass `prompt_embeds`. *Model offload*: one model at a time on
the card, both caches of a pair included. *Group offload*: only a part of the transformer is on the card at a time, see
`enable_group_offload` of diffusers; its need is that of keys and values, of the decoder and of the blocks on the card,
and is not computed here.

- *tiny VAE*: `pipe.vae = AutoencoderTinyWan…`, `--tiny-vae`; softer pictures, for a twenty-fifth of the decoder's
  operations (Wan 2.1) or a two-hundredth (Wan2.2-TI2V-5B).
- *int8 past*: `kv_dtype="int8"`, `--kv-dtype int8`.
- *int8*, *Q4_0* of the transformer's weights: below. A published GGUF file keeps some matrices in more bits than its
  name says, and takes more than this row.

## The figures

*All*, *no text encoder* and *one at a time* are the most at once with all models on the card, with all but the text
encoder, and under model offload.

{tables}## Weights in fewer bits

diffusers' own quantizers do the work; nothing of this package is special to them. `pip install
'wan-autoregressive[quant]'` brings torchao and gguf. Saved states know the format of the weights, and a LoRA goes on
top as on any others.

int8 weights by torchao, scaled back layer by layer. With `Int8DynamicActivationInt8WeightConfig` in its place the
matrix products are made in int8 as well:

```python
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from torchao.quantization import Int8WeightOnlyConfig

int8 = PipelineQuantizationConfig(quant_mapping={{"transformer": TorchAoConfig(Int8WeightOnlyConfig())}})
pipe = WanAutoregressivePipeline.from_pretrained("DIR", dtype=torch.bfloat16, quantization_config=int8)
```

What `pipe.save_pretrained` writes of it loads without `quantization_config`, but with the `dtype` that it was made in:
without one diffusers takes bfloat16 for it, and the video is another. The weights are the same to the bit, and so is
the video on a CPU once they begin at the same addresses as before (elsewhere some matrix products round otherwise, by
1e-5 in the latents of the test).

A GGUF file, in diffusers' names or in Wan's own, as most are published; its config comes from a folder of the same
model:

```python
from diffusers import GGUFQuantizationConfig

transformer = CausalWanTransformer3DModel.from_single_file(
    "FILE.gguf",
    config="DIR",
    subfolder="transformer",
    quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
    dtype=torch.bfloat16,
)
pipe = WanAutoregressivePipeline.from_pretrained("DIR", transformer=transformer, dtype=torch.bfloat16)
```

Stored as float8 and computed in bfloat16 (layerwise casting). A LoRA is loaded before it:

```python
pipe = WanAutoregressivePipeline.from_pretrained("DIR", dtype=torch.bfloat16)
pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
```

`tests/integration/test_quantized_weights.py` makes whole rollouts with each of the three in float32 on a CPU, and
finds them equal to those of plain weights with the quantised values (int8 activations apart, which no plain weights
give).

Not run, for want of a GPU:

```python
# bitsandbytes, 4 bits in NF4
from diffusers import BitsAndBytesConfig

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
config = PipelineQuantizationConfig(quant_mapping={{"transformer": nf4}})

# NVFP4 on Blackwell, by torchao
from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

config = PipelineQuantizationConfig(
    quant_mapping={{"transformer": TorchAoConfig(NVFP4DynamicActivationNVFP4WeightConfig())}}
)
pipe = WanAutoregressivePipeline.from_pretrained("DIR", dtype=torch.bfloat16, quantization_config=config)
```

LongLive 2.0's published NVFP4 file is in a layout of its own, which neither of them reads.
"""


@dataclass(frozen=True)
class Row:
    """One command and what it computes, in bytes."""

    command: str
    weights: int
    kv_cache: int
    most: dict[str, int]
    """By what is on the card, a key of `_WAYS`."""


@functools.cache
def row(model: str, settings: str) -> Row:
    """What the command for a model under these settings computes."""
    words = f"{MODELS[model]} {_COMMON} {SETTINGS[settings]}".strip()
    parser = argparse.ArgumentParser()
    estimate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["estimate", *words.split()])
    computed = estimate_memory(workload_of(args), args.weights)
    most = computed.most_bytes
    one_at_a_time = max(most["transformer_alone"], most["vae_alone"], computed.text_encoder_bytes)
    ways = most["all_models"], most["without_text_encoder"], one_at_a_time
    return Row(
        command=f"wan-ar estimate {words}",
        weights=computed.experts * computed.transformer_bytes,
        kv_cache=computed.kv_cache_bytes,
        most=dict(zip(_WAYS, ways, strict=True)),
    )


def table(model: str) -> str:
    """The commands of a model, and a row of figures for each."""
    rows = {settings: row(model, settings) for settings in SETTINGS}
    commands = "".join(f"{made.command}\n" for made in rows.values())
    lines = "".join(
        f"| {settings} | {' | '.join(map(human_bytes, (made.weights, made.kv_cache, *made.most.values())))} |\n"
        for settings, made in rows.items()
    )
    head = f"| set | transformer | K/V | {' | '.join(_WAYS.values())} |\n|---|---|---|---|---|---|\n"
    return f"### {model}\n\n```\n{commands}```\n\n{head}{lines}\n"


def choice(model: str, card: int) -> str:
    """What to set for a card of so many GiB."""
    for ways in (("all models on it", "text encoder off it"), ("model offload",)):
        for settings in SETTINGS:
            for way in ways:
                if row(model, settings).most[way] <= card * 2**30 * USABLE:
                    return f"{settings}; {way}"
    return "group offload"


def page() -> str:
    """The whole page."""
    summary = "".join(f"| {card} GB | {' | '.join(choice(model, card) for model in MODELS)} |\n" for card in CARDS)
    return _PAGE.format(
        models=" | ".join(MODELS),
        rule="---|" * (len(MODELS) - 1) + "---",
        summary=summary,
        tables="".join(map(table, MODELS)),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
