"""What a run of `wan-ar generate` works on: the videos to make, the frames they start from, the words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.media.reading import load_image, load_video
from wan_autoregressive.media.video_writer import check_video_target, check_writable_folder

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    output: Path


def plan_jobs(config: GenerateConfig) -> list[Job]:
    """List the videos to make, having checked that their files can be written.

    Raises:
        ValueError: the prompts file cannot be read or is empty.
        OSError: the output cannot be written.
    """
    if config.prompts is None:
        assert config.prompt is not None  # one of the two, as GenerateConfig checks
        return [Job(config.prompt, check_video_target(config.output))]
    try:
        lines = config.prompts.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"cannot read the prompts file '{config.prompts}': {reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"the prompts file '{config.prompts}' holds no prompt; write one per line")
    # The folder itself is made when the first video is; here it is enough that this will work.
    check_writable_folder(config.output if config.output.exists() else config.output.parent)
    digits = max(4, len(str(len(prompts))))
    return [Job(prompt, config.output / f"{number:0{digits}}.mp4") for number, prompt in enumerate(prompts, start=1)]


def load_given(config: GenerateConfig) -> Pixels | None:
    """Read the frames that the video starts from, (frames, height, width, 3); None when there are none.

    A clip is resampled to the rate of the video, so that its motion keeps its speed.

    Raises:
        ValueError: unreadable, or so long that nothing is left to generate.
    """
    if config.image is not None:
        given = load_image(config.image, config.height, config.width)
    elif config.video is not None:
        given = load_video(config.video, config.height, config.width, max_frames=config.num_frames, fps=config.fps)
    else:
        return None
    if len(given) >= config.num_frames:
        raise ValueError(
            f"num_frames is {config.num_frames}, given frames included, and '{config.image or config.video}' has at "
            f"least as many at {config.fps:g} frames per second; raise num_frames or give less"
        )
    return given


def check_prompts(pipe: Any, config: GenerateConfig, prompt: str) -> None:
    """Raise ValueError when a prompt has more tokens than are kept, since the rest would be dropped in silence."""
    changes = [(f"prompt at latent frame {frame}", text) for frame, text in config.prompt_schedule().items()]
    for name, text in (("prompt", prompt), ("negative_prompt", config.negative_prompt), *changes):
        if text is None:
            continue
        count = len(pipe.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        if count > config.max_sequence_length:
            raise ValueError(
                f"{name} is too long: {count} tokens, and max_sequence_length is {config.max_sequence_length}; "
                "shorten it"
            )
