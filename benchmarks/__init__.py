"""Experiments on what `wan-ar benchmark` measures, from the repository root: `python -m benchmarks.<name> --help`.

- `roofline`: the transformer against its bare matrix products and attentions
- `baselines`: other ways to make the same chunks, on the same weights
- `compiled`: against `torch.compile`
- `alongside`: decoding while the next chunk is denoised
- `sweep`: window, resolution, chunk size, position mode, storage of the cache
- `stream_batch`: steps of several chunks as one batch against one chunk after the other
- `long_rollout`: does the time per chunk grow?

What is compared is measured in turns within one run, so that a busy machine slows all of it alike.
"""
