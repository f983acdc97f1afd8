"""A rollout's state in a folder.

It is bound to the weights and the config of its models: with others the video would go on as another one without a
word.
"""

import dataclasses
import os
from typing import Any

import torch

from wan_autoregressive._version import __version__
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.model_identity import check_same_model, model_identity
from wan_autoregressive.pipelines.state_folder import read_state, write_state
from wan_autoregressive.pipelines.state_values import pack, unpack


def write_rollout_state(
    folder: str | os.PathLike[str],
    components: WanComponents,
    is_decoded: bool,
    state: dict[str, Any],
    notes: dict[str, Any] | None,
) -> None:
    """Replace the state in `folder`, with JSON `notes` of the caller's as one unit.

    Raises:
        ValueError: `state` holds something that cannot be saved.
        OSError: it could not be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    content = {
        "package_version": __version__,
        "model": model_identity(components, with_vae=is_decoded),
        "rollout": pack(state, tensors),
        "notes": notes,
    }
    write_state(folder, content, tensors)


def read_rollout_state(
    folder: str | os.PathLike[str], components: WanComponents
) -> tuple[RolloutConfig, dict[str, Any]]:
    """Settings and state that were saved, its tensors where the transformer runs.

    Raises:
        ValueError: nothing whole is there, or it is of another version or of other models.
    """
    content, tensors = read_state(folder)
    check_same_model(content["model"], model_identity(components, with_vae="vae" in content["model"]), folder)
    state = unpack(content["rollout"], tensors, components.device)
    known = {field.name for field in dataclasses.fields(RolloutConfig)}
    unknown = sorted(set(state["config"]) - known)
    if unknown:
        raise ValueError(
            f"the state in '{folder}' was saved by version {content['package_version']}, whose settings this version "
            f"({__version__}) does not know: {', '.join(unknown)}"
        )
    return RolloutConfig(**state["config"]), state
