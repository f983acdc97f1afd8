"""Generation settings: the typed config and the presets of published recipes."""

from wan_autoregressive.configs.generate_config import SETTING_NAMES, GenerateConfig, resolve_config
from wan_autoregressive.configs.presets import load_preset, preset_names

__all__ = ["SETTING_NAMES", "GenerateConfig", "load_preset", "preset_names", "resolve_config"]
