"""What a caller may pass as a prompt, and what a rollout keeps of it."""

from dataclasses import dataclass
from typing import Any

import torch

Prompt = str | list[str] | torch.Tensor
"""Words, one text for each video, or embeddings `(videos or 1, text_tokens, text_dim)`."""


@dataclass(frozen=True)
class PromptState:
    """Embeddings `(batch, text_tokens, text_dim)` of a prompt, and its words if they are known."""

    embeds: torch.Tensor
    text: list[str] | None = None


def prompt_count(prompt: Prompt) -> int:
    """Videos that a prompt describes."""
    return 1 if isinstance(prompt, str) else len(prompt)


def check_prompt(prompt: object, text_dim: int) -> None:
    """Raises `ValueError` for anything that is neither non-empty text nor embeddings of `text_dim` channels."""
    if isinstance(prompt, torch.Tensor):
        if prompt.ndim != 3 or prompt.shape[2] != text_dim or not prompt.is_floating_point():
            raise ValueError(
                f"prompt embeddings are {prompt.dtype} of shape {tuple(prompt.shape)}; they must be floating point of "
                f"shape (batch, text_tokens, {text_dim}), as this transformer takes them"
            )
        return
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt is {prompt!r}; it must be a text, a list of texts, or embeddings")


def expand_to_batch(embeds: torch.Tensor, batch_size: int, name: str = "prompt") -> torch.Tensor:
    """Embeddings repeated so that each prompt serves as many consecutive videos as it has to."""
    if batch_size % embeds.shape[0]:
        raise ValueError(f"{name} has {embeds.shape[0]} entries, which do not divide a batch of {batch_size} videos")
    return embeds.repeat_interleave(batch_size // embeds.shape[0], dim=0)


def check_one_of(required: bool = False, **arguments: Any) -> Any:
    """The one argument that is not `None`. Raises `ValueError` for two, and for none if one is required."""
    present = [name for name, value in arguments.items() if value is not None]
    if len(present) > 1 or (required and not present):
        got = " and ".join(present) or "neither"
        raise ValueError(f"pass {'exactly' if required else 'at most'} one of {', '.join(arguments)}; got {got}")
    return arguments[present[0]] if present else None
