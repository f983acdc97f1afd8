"""A prompt as it may come from anywhere: on one line, and without characters that are no text."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

MAX_PROMPT_LENGTH = 1000


def clean_prompt(text: str) -> str:
    """One line, blanks and line breaks as single spaces.

    Raises:
        ValueError: it is empty, or holds control characters, which show nowhere and mean nothing to a text encoder.
    """
    text = " ".join(text.split())
    if not text:
        raise ValueError("a prompt says what the video shows; this one is empty")
    strange = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if strange is not None:
        raise ValueError(f"a prompt is text; this one holds U+{ord(strange):04X}, leave it out")
    return text


Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT_LENGTH), AfterValidator(clean_prompt)]
