"""The vocabulary of the tiny checkpoint's tokenizer: small, and no English text collapses to `<unk>` in it."""

from __future__ import annotations

import string

_WORD_START = "\u2581"  # what T5 tokenizers put in the place of the blank before a word

# Unigram scores are log probabilities: the longest piece wins when it costs less than the sum of its parts.
_CHARACTER_SCORE = -10.0
_PIECE_SCORE = -8.0
_WORD_SCORE = -6.0

_WORDS = """
a an and are at background behind big black blue cat circle city cross cyan dark day dog down drives fast field fire
flies forest from gray green house in into is it left light man moving mountain navy near night now of on over person
purple rain rains red right river road runs sea shape sky slowly small snow square street sun sunset the through to
town tree triangle under up walks water white wind with woman yellow
"""
_PIECES = "al an ar ed en er es ing in ion it le ly nd on or ou re st th ti"


def tiny_vocabulary() -> list[tuple[str, float]]:
    """About 230 `(piece, score)` pairs in the order `T5Tokenizer(vocab=…)` wants: pad, end, unknown, then the rest.

    Every printable ASCII character is a piece, so different ASCII prompts give different token ids.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (_WORD_START, -2.0)]
    characters = string.ascii_letters + string.digits + string.punctuation
    return [
        *special,
        *((character, _CHARACTER_SCORE) for character in characters),
        *((piece, _PIECE_SCORE) for piece in _PIECES.split()),
        *((_WORD_START + word, _WORD_SCORE) for word in _WORDS.split()),
    ]
