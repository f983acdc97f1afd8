"""The pipeline and the rollouts it starts."""

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.pipeline_wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.pipelines.rollout_estimate import RolloutEstimate

__all__ = ["RolloutConfig", "RolloutEstimate", "WanAutoregressivePipeline", "WanRollout", "WanVideoChunk"]
