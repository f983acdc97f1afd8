"""What the training stages share: workers, a resumable loop, the log."""

import dataclasses
import datetime
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from tqdm import tqdm

from examples.train_demo.optimizer import MuonAdamW

CHECKPOINT_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Worker:
    """One of `count` processes that train together: each has its own batch, gradients are averaged."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def generator(self, *key: int) -> torch.Generator:
        """Random numbers for this worker and `key` (seed, stage, step): a resumed run draws what it would have."""
        mixed = 0
        for part in (*key, self.rank):
            mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 1)
        return torch.Generator().manual_seed(mixed)

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the workers, in place."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = (flat / self.count).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()


@dataclasses.dataclass(frozen=True)
class Acceleration:
    """What this machine offers beyond plain fp32 PyTorch; the results differ by rounding only."""

    bfloat16: bool = False  # worth it only where the CPU multiplies bf16 matrices itself
    compiled: bool = False  # needs a C++ compiler

    @classmethod
    def detect(cls) -> "Acceleration":
        return cls(torch.cpu._is_amx_tile_supported(), shutil.which("g++") is not None)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, dynamic=False) if self.compiled else function


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps of a stage and their learning rate: a short warm-up, a plateau, a linear decay to zero at the end."""

    steps: int
    learning_rate: float
    warm_up_steps: int = 50
    decay_fraction: float = 0.4
    clip_norm: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        warm_up = min(1.0, (step + 1) / self.warm_up_steps)
        decay = min(1.0, (self.steps - step) / max(1.0, self.decay_fraction * self.steps))
        return self.learning_rate * min(warm_up, decay)


def log_line(folder: Path, **values: object) -> None:
    """Append one JSON line, with the time of day, to `train_log.jsonl` in `folder`."""
    values["at"] = datetime.datetime.now().isoformat(timespec="seconds")
    with (folder / "train_log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({key: _rounded(value) for key, value in values.items()}) + "\n")


def train(
    name: str,
    model: nn.Module,
    schedule: Schedule,
    losses_at: Callable[[int], dict[str, torch.Tensor]],
    folder: Path,
    worker: Worker,
    sample: Callable[[int], dict[str, float]] | None = None,
    sample_every: int = 500,
) -> None:
    """Run one stage to its end, from its checkpoint `folder/name.pt` if there is one.

    Args:
        name: of the stage; names the checkpoint and the log lines.
        model: trained in place; parameters with `requires_grad=False` stay as they are.
        losses_at: step -> losses by name; `"loss"` is the one that is minimised, the others are only logged.
        folder: where checkpoints and the log go.
        sample: called by the first worker every `sample_every` steps and at the end; returns figures for the log.
    """
    parameters = [(key, value) for key, value in model.named_parameters() if value.requires_grad]
    optimizer = MuonAdamW(parameters, schedule.learning_rate)
    path = folder / f"{name}.pt"
    first_step = _resume(path, model, optimizer)
    saved_at = time.monotonic()
    means: dict[str, float] = {}
    bar = tqdm(
        range(first_step, schedule.steps), name, schedule.steps, initial=first_step, disable=not worker.is_first
    )
    for step in bar:
        optimizer.set_learning_rate(schedule.learning_rate_at(step))
        losses = losses_at(step)
        model.zero_grad(set_to_none=True)
        losses["loss"].backward()
        gradients = [value.grad for _, value in parameters if value.grad is not None]
        worker.average(gradients)
        torch.nn.utils.clip_grads_with_norm_(
            [value for _, value in parameters], schedule.clip_norm, nn.utils.get_total_norm(gradients)
        )
        optimizer.step()
        for key, value in losses.items():
            means[key] = means.get(key, value.item()) * 0.95 + value.item() * 0.05
        is_last = step + 1 == schedule.steps
        if worker.is_first and (step % 25 == 0 or is_last):
            bar.set_postfix({key: f"{value:.4f}" for key, value in means.items()})
            log_line(folder, stage=name, step=step, lr=schedule.learning_rate_at(step), **means)
        if worker.is_first and sample is not None and ((step + 1) % sample_every == 0 or is_last):
            log_line(folder, stage=name, step=step, **sample(step + 1))
        if worker.is_first and (is_last or time.monotonic() - saved_at > CHECKPOINT_SECONDS):
            _save(path, step + 1, model, optimizer)
            saved_at = time.monotonic()
    worker.wait()


def _resume(path: Path, model: nn.Module, optimizer: MuonAdamW) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save(path: Path, step: int, model: nn.Module, optimizer: MuonAdamW) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
    temporary.replace(path)


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value
