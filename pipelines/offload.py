"""Models whose weights accelerate's or diffusers' hooks move in and out."""

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, ModelHook


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers move the model's weights in and out."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            return True
        if any(
            isinstance(hook, CpuOffload) or (isinstance(hook, AlignDevicesHook) and hook.offload)
            for hook in _hooks(module)
        ):
            return True
    return False


def make_room(model: torch.nn.Module) -> None:
    """Move a model to the CPU if model offload brings it to its device for every use.

    A model's own hook moves out only the model before it in the pipeline's order: of two that take turns the second
    would stay when the first one comes again.
    """
    for hook in _hooks(model):
        if isinstance(hook, CpuOffload):
            hook.init_hook(model)


def _hooks(module: torch.nn.Module) -> list[ModelHook]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [] if hook is None else [hook]))
