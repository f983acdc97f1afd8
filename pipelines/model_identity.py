"""Which models a saved video belongs to, and in what others differ from them."""

import dataclasses
import json
import os
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from wan_autoregressive.models.weights_fingerprint import weights_fingerprint
from wan_autoregressive.pipelines.components import WanComponents


def model_identity(components: WanComponents, with_vae: bool) -> dict[str, Any]:
    """What a saved video is bound to, as JSON: config, settings and weights of the models that make it.

    Args:
        with_vae: whether the video is decoded; otherwise the VAE does not matter.
    """
    codec = components.codec
    identity: dict[str, Any] = {}
    for name, transformer in zip(("transformer", "transformer_2"), components.transformers, strict=False):
        identity[name] = _component_identity(transformer)
        identity[name]["sinusoid_dtype"] = str(transformer.condition_embedder.timesteps_proj.sinusoid_dtype)
    if components.transformer_2 is not None:
        identity["transformer_2"]["boundary_ratio"] = components.boundary_ratio
    if with_vae:
        identity["vae"] = None if codec is None else _component_identity(codec.vae) | {"tiling": codec.settings()}
    return identity


def _component_identity(component: Any) -> dict[str, Any]:
    config = {name: value for name, value in component.config.items() if not name.startswith("_")}
    return {
        # Through JSON, as the saved one went: tuples become lists.
        "config": json.loads(json.dumps(config, default=_as_json)),
        "dtype": str(component.dtype).removeprefix("torch."),
        "weights": dataclasses.asdict(weights_fingerprint(component)),
    }


def _as_json(value: Any) -> Any:
    """A quantization config is an object in a model that was just quantised, and a dict in one from a folder."""
    return value.to_dict() if isinstance(value, QuantizationConfigMixin) else str(value)


def check_same_model(saved: dict[str, Any], now: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Raise `ValueError` with the first difference between two identities; `saved` is from the state in `folder`."""
    if "transformer_2" in now and "transformer_2" not in saved:
        raise ValueError(f"the state in '{folder}' is of one transformer; this pipeline has a transformer_2 too")
    for name, was in saved.items():
        got = now.get(name)
        if got is None:
            raise ValueError(f"the state in '{folder}' needs a {name}; this pipeline has none")
        for part in [part for part in was if part != "weights"]:
            # Named to the key: "dtype: float32, now bfloat16", "config.num_layers: 30, now 40".
            pairs = was[part] if isinstance(was[part], dict) else {"": was[part]}
            present = got[part] if isinstance(got[part], dict) else {"": got[part]}
            for key in sorted(pairs.keys() | present.keys()):
                if pairs.get(key) != present.get(key):
                    raise ValueError(
                        f"the state in '{folder}' is of another {name}: {part}{key and '.'}{key} was "
                        f"{pairs.get(key)!r} and is {present.get(key)!r} now"
                    )
        layout, values = (got["weights"][key] == was["weights"][key] for key in ("layout", "values"))
        unknown = None in (got["weights"]["values"], was["weights"]["values"])
        if not layout or not (values or unknown):
            what = "values" if layout else "names, shapes, dtypes or adapters"
            raise ValueError(f"the state in '{folder}' is of a {name} with other weights: their {what} differ")
