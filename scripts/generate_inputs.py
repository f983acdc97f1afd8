"""What a run of `wan-ar generate` works on: the videos to make, the frames they start from, the words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.configs.read_yaml import read_text
from wan_autoregressive.media.reading import load_image, load_video
from wan_autoregressive.media.video_writer import check_writable_folder
from wan_autoregressive.scripts.output_files import check_output_files

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    output: Path


def read_prompts(config: GenerateConfig) -> list[str]:
    """The first prompt of each video. Raises `ValueError` if there is none, or the file cannot be read."""
    if config.prompt is not None:
        return [config.prompt]
    if config.prompts is None:
        raise ValueError("give one of prompt and prompts (a file with one per line), got neither")
    lines = read_text(config.prompts, "prompts file").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"the prompts file '{config.prompts}' holds no prompt; write one per line")
    return prompts


def plan_jobs(config: GenerateConfig, prompts: list[str], inputs: Iterable[Path] = ()) -> list[Job]:
    """List the videos to make, having checked that their files can be written.

    Args:
        prompts: What `read_prompts` gave.
        inputs: Files that the run reads and must not write.

    Raises:
        ValueError: there is no output, or a file would be lost.
        OSError: the output cannot be written.
    """
    if config.output is None:
        raise ValueError("output is missing; give --output or set it in the yaml file")
    if config.prompts is None:
        jobs = [Job(prompts[0], config.output)]
    else:
        # The folder itself is made when the first video is; here it is enough that this will work.
        check_writable_folder(config.output if config.output.exists() else config.output.parent)
        digits = max(4, len(str(len(prompts))))
        names = [f"{number:0{digits}}.mp4" for number in range(1, len(prompts) + 1)]
        jobs = [Job(prompt, config.output / name) for prompt, name in zip(prompts, names, strict=True)]
        if not config.output.exists():
            return jobs
    for job in jobs:
        check_output_files(job.output, inputs, config.contact_sheet)
    return jobs


def load_given(config: GenerateConfig) -> Pixels | None:
    """Read the frames that the video starts from, or is made from, (frames, height, width, 3); None without any.

    A clip is resampled to the rate of the video, so that its motion keeps its speed.

    Raises:
        ValueError: unreadable, or so long that nothing is left to generate.
    """
    height, width, num_frames = config.rollout.height, config.rollout.width, config.rollout.num_frames
    if config.image is not None:
        given = load_image(config.image, height, width)
    elif config.video is not None:
        given = load_video(config.video, height, width, max_frames=num_frames, fps=config.fps)
    else:
        return None
    if config.rollout.strength is None and num_frames is not None and len(given) >= num_frames:
        raise ValueError(
            f"num_frames is {num_frames}, given frames included, and '{config.image or config.video}' has at least as "
            f"many at {config.fps:g} frames per second; raise num_frames or give less"
        )
    return given


def check_prompts(pipe: Any, config: GenerateConfig, prompt: str) -> str | None:
    """Check all texts of one video against the tokenizer; a line on words that its vocabulary does not have, if any.

    Raises:
        ValueError: a text has more tokens than are kept, since the rest would be dropped in silence.
    """
    longest, unknown = config.rollout.max_sequence_length, pipe.tokenizer.unk_token_id
    changes = [(f"prompt at latent frame {frame}", text) for frame, text in config.prompt_schedule().items()]
    missing: dict[str, None] = {}  # a set that keeps the order
    for name, text in (("prompt", prompt), ("negative_prompt", config.negative_prompt), *changes):
        if text is None:
            continue
        tokens = _token_ids(pipe, text)
        if len(tokens) > longest:
            raise ValueError(
                f"{name} is too long: {len(tokens)} tokens, and max_sequence_length is {longest}; shorten it"
            )
        if unknown in tokens:
            missing |= dict.fromkeys(word for word in text.split() if unknown in _token_ids(pipe, word))
    if not missing:
        return None
    words = ", ".join(f"'{word}'" for word in list(missing)[:10]) + (", …" if len(missing) > 10 else "")
    return f"warning: the vocabulary of the model has no {words}; it reads every such word as unknown"


def _token_ids(pipe: Any, text: str) -> list[int]:
    ids: list[int] = pipe.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    return ids
