"""Which frames, at which noise, in which order, and what the cache keeps: one file for each way to sample."""

from wan_autoregressive.pipelines.samplers.base import Sampler, SamplingContext

__all__ = ["Sampler", "SamplingContext"]
