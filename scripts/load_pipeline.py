"""From a checkpoint folder to a pipeline that is ready to render; every way this can fail is one line."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.configs.checkpoints import checkpoint_folder, nearest_checkpoint, published_checkpoints
from wan_autoregressive.demo import DEMO, demo_checkpoint

if TYPE_CHECKING:
    import torch

# Component -> what its class must be called in model_index.json; None where several do.
_COMPONENTS = {
    "tokenizer": None,
    "text_encoder": None,
    "transformer": ("WanTransformer3DModel", "CausalWanTransformer3DModel"),
    "vae": ("AutoencoderKLWan",),
    "scheduler": None,
}
# What a pair of experts has beside, and a transformer that attends to an image.
_OPTIONAL = {"transformer_2": _COMPONENTS["transformer"], "image_encoder": None, "image_processor": None}
_VOCABULARIES = ("tokenizer.json", "spiece.model")
# What the weights of a layer are called, in the components that have `num_layers` of them.
_LAYER_NAMES = {
    "transformer": re.compile(r"blocks\.(\d+)\."),
    "transformer_2": re.compile(r"blocks\.(\d+)\."),
    "text_encoder": re.compile(r"encoder\.block\.(\d+)\."),
}


def model_folder(config: GenerateConfig) -> Path:
    """The folder that `config.model` names.

    A folder that is there comes first, then the packaged demo for `demo`, then what `wan-ar pull` got under a name.

    Raises:
        ValueError: the name is that of a published checkpoint that is not there; the message says how to get it.
    """
    name = str(config.model)
    if name == DEMO and not config.model.exists():
        return demo_checkpoint()
    if name in published_checkpoints() and not config.model.exists():
        return checkpoint_folder(name)
    return config.model


def check_model_folder(folder: Path) -> None:
    """Check, without loading anything, that `folder` is a Wan checkpoint in diffusers layout with whole files.

    Raises:
        ValueError: what is missing, foreign or damaged.
    """
    if not folder.is_dir():
        near = nearest_checkpoint(str(folder))
        hint = f"; did you mean the published checkpoint '{near}'?" if near else ""
        state = "is a file; `wan-ar convert` makes a folder of it" if folder.exists() else f"does not exist{hint}"
        raise ValueError(f"the model folder '{folder}' {state}")
    index = _read_index(folder)
    optional = {name: allowed for name, allowed in _OPTIONAL.items() if (index.get(name) or [None])[0]}
    components = {**_COMPONENTS, **optional}
    for name, allowed in components.items():
        entry = index.get(name)
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if kind is None or (allowed is not None and kind not in allowed):
            raise ValueError(
                f"'{folder}' is a checkpoint of another model ({index.get('_class_name', 'no class named')}): "
                f"its {name} is {kind or 'missing'}" + (f", a Wan model has {allowed[0]}" if allowed else "")
            )
        if not (folder / name).is_dir():
            raise ValueError(f"the model folder '{folder}' is incomplete: there is no folder '{name}' in it")
    # Without its vocabulary a tokenizer still loads, and then gives the same few tokens for every prompt.
    if not any((folder / "tokenizer" / name).is_file() for name in _VOCABULARIES):
        raise ValueError(
            f"the model folder '{folder}' is incomplete: 'tokenizer' holds neither {' nor '.join(_VOCABULARIES)}"
        )
    names: dict[str, set[str]] = {component: set() for component in components}
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            # Opening compares the header with the size of the file and reads no weights.
            with safe_open(path, framework="np") as file:
                names.setdefault(path.parent.name, set()).update(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the weights in '{path}' are damaged or cut off: {error}") from error
    for config_path in (folder / component / "config.json" for component in (*_LAYER_NAMES, "vae")):
        component = config_path.parent.name
        config = read_json(config_path) if config_path.is_file() else {}
        if component in _LAYER_NAMES and names.get(component):
            check_layers(component, config, names[component], config_path)


def check_layers(component: str, config: dict[str, Any], names: Iterable[str], config_path: Path) -> None:
    """Raise ValueError if a config claims more layers than there are weights for; building a million takes minutes."""
    numbers = [int(found[1]) for found in map(_LAYER_NAMES[component].match, names) if found]
    layers, found = config.get("num_layers"), max(numbers, default=-1) + 1
    if isinstance(layers, int) and layers > found:
        raise ValueError(f"'{config_path}' says num_layers is {layers}, and there are weights for {found}")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.exists():
        raise ValueError(f"'{folder}' is not a checkpoint folder: it has no model_index.json")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read '{path}': {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot read '{path}': it must hold a JSON object")
    return content


def load_pipeline(config: GenerateConfig) -> Any:
    """Load the checkpoint that `config` names onto its device and apply its scheduler settings.

    Raises:
        ValueError: the device is not there or the checkpoint does not load.
        RuntimeError: out of memory.
    """
    device = _pick_device(config.device)
    dtype = _pick_dtype(config.dtype, device)
    with _quiet_libraries():
        pipe = _load(model_folder(config), dtype)
        if config.tiny_vae is not None:
            pipe.vae = load_tiny_vae(config.tiny_vae, config.tiny_vae_latents, dtype)
        pipe.to(device)
        if config.vae_device is not None:
            pipe.vae.to(_pick_device(config.vae_device))
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, config)
    if config.vae_tiling:
        if config.tiny_vae is not None:
            raise ValueError("vae_tiling and tiny_vae do not go together: a tiny VAE needs no tiles; leave one out")
        pipe.vae.enable_tiling()
    return pipe


def set_scheduler(pipe: Any, config: GenerateConfig) -> None:
    """Give the pipeline a scheduler with the shift, warp and steps of `config`, where it says any."""
    overrides = {name: getattr(config, name) for name in ("shift", "warp") if getattr(config, name) is not None}
    if config.rollout.denoising_steps is not None:
        overrides["denoising_steps"] = config.rollout.denoising_steps
    if overrides:
        from wan_autoregressive.schedulers import SelfForcingScheduler

        pipe.scheduler = SelfForcingScheduler.from_config(pipe.scheduler.config, **overrides)


def load_tiny_vae(path: Path, latent_space: Any, dtype: Any) -> Any:
    """A folder, or a single file whose latents are of that kind; `ValueError` where it does not load."""
    from wan_autoregressive.models import AutoencoderTinyWan

    try:
        if path.is_dir():
            return AutoencoderTinyWan.from_pretrained(path, dtype=dtype)
        return AutoencoderTinyWan.from_single_file(path, latent_space=latent_space, dtype=dtype)
    except OSError as error:
        raise ValueError(f"cannot load the tiny VAE '{path}': {' '.join(str(error).split())}") from error


def with_model_defaults(config: GenerateConfig, pipe: Any) -> GenerateConfig:
    """Fill in the sampler settings that were left to the model, so that a report says what was used."""
    scheduler, rollout = pipe.scheduler.config, config.rollout
    if rollout.num_inference_steps is None:
        steps = tuple(float(step) for step in scheduler.denoising_steps)
        rollout = dataclasses.replace(rollout, denoising_steps=steps)
    return config.model_copy(
        update={"rollout": rollout, "shift": float(scheduler.shift), "warp": bool(scheduler.warp)}
    )


def _load(folder: Path, dtype: torch.dtype) -> Any:
    import torch

    from wan_autoregressive import WanAutoregressivePipeline

    try:
        return WanAutoregressivePipeline.from_pretrained(str(folder), dtype=dtype)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RuntimeError(f"there is not enough memory to load '{folder}': {error}") from error
    # A damaged folder fails in as many ways as there are loaders in it (pickle, JSON, safetensors, sentencepiece).
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load the model '{folder}': {reason}") from error


def _pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    module = getattr(torch, device.type)
    count = module.device_count() if module.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"device '{name}' is not there: torch {torch.__version__} sees {count} of that kind")
    return device


def _pick_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own bars and reports off stderr while loading; what matters comes as an exception."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
