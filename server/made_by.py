"""What a live video is bound to: the model, and those of the server's settings that it cannot bring along."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from wan_autoregressive.pipelines.model_identity import check_same_model, model_identity

if TYPE_CHECKING:
    from wan_autoregressive.server.live_model import LiveModel

_STEPS = "denoising_steps"  # of the scheduler; a video knows its own


def made_by(model: LiveModel) -> dict[str, Any]:
    """As JSON: picture and scheduler by the names of their flags, and which models there are."""
    scheduler = {
        name: value for name, value in model.pipe.scheduler.config.items() if name[0] != "_" and name != _STEPS
    }
    picture = {"fps": model.fps, "scale": model.scale, "height": model.height, "width": model.width}
    models = model_identity(model.pipe.wan_components(), with_vae=True)
    described: dict[str, Any] = json.loads(
        json.dumps({"settings": picture | scheduler, "models": models}, default=str)
    )
    return described


def check_made_by(saved: dict[str, Any], model: LiveModel) -> None:
    """Raise `ValueError`, in one line, where this server would go on with another video than `saved` says."""
    now, way_out = model.made_by, "it can be watched and downloaded, and goes on with a server that is started as then"
    for name, was in saved["settings"].items():
        if now["settings"].get(name) != was:
            here = now["settings"].get(name)
            raise ValueError(f"this video was made with {name} {was}, and this server has {name} {here}; {way_out}")
    try:
        check_same_model(saved["models"], now["models"], "this video")
    except ValueError as error:
        raise ValueError(f"this video was made by another model; {way_out}: {error}") from error
