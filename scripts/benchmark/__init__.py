"""`wan-ar benchmark`: what a rollout costs, counted exactly and timed beside the hardware's limit and baselines."""
