"""Nodes for ComfyUI. Link this folder into its `custom_nodes`; README.md says how and what they do."""

from wan_autoregressive.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
