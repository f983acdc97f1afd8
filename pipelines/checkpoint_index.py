"""The component classes that a pipeline folder names, on disk and when loaded."""

from typing import Any

STOCK_CLASSES: dict[str, tuple[str, str]] = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}
"""What saved folders name. diffusers refuses Hub repos that name classes of other packages."""

_OUR_CLASSES = {
    "transformer": ("wan_autoregressive.models.causal_wan_transformer", "CausalWanTransformer3DModel"),
    "transformer_2": ("wan_autoregressive.models.causal_wan_transformer", "CausalWanTransformer3DModel"),
    "scheduler": ("wan_autoregressive.schedulers.self_forcing_scheduler", "SelfForcingScheduler"),
}
_TRANSFORMERS = ("WanTransformer3DModel", "CausalWanTransformer3DModel")
_VAES = ("AutoencoderKLWan",)
# Entries of other Wan pipelines' folders that say nothing to this one.
_NOT_OURS = ("expand_timesteps",)


def swap_component_classes(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A `model_index.json` with our classes in the place of stock ones.

    Raises:
        ValueError: the folder holds another kind of model, or half of a pair of experts.
    """
    config_dict = dict(config_dict)
    for name, allowed in (("transformer", _TRANSFORMERS), ("transformer_2", _TRANSFORMERS), ("vae", _VAES)):
        class_name = (config_dict.get(name) or (None, None))[1]
        if class_name is not None and class_name not in allowed:
            raise ValueError(
                f"this folder's {name} is a {class_name}; WanAutoregressivePipeline needs a {' or '.join(allowed)}"
            )
    first, second = ((config_dict.get(name) or (None, None))[1] for name in ("transformer", "transformer_2"))
    if second is not None and first is None:
        raise ValueError("this folder holds a transformer_2 and no transformer; a pair of experts needs both")
    for name in _NOT_OURS:
        config_dict.pop(name, None)
    for name, classes in _OUR_CLASSES.items():
        if (config_dict.get(name) or (None, None))[1] is not None:
            config_dict[name] = list(classes)
    return config_dict
