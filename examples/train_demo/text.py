"""Tokenizer and text encoder of the demo checkpoint: one token per word, a small random encoder that is never trained.

The prompts of the toy world have one form, so a frozen random encoder keeps them well apart; what a word means is
learned in the transformer's cross-attention.
"""

from collections.abc import Sequence

import torch
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from examples.train_demo import world

TEXT_DIM = 64
MAX_TOKENS = 512  # what the pipeline pads embeddings to


def create_tokenizer() -> T5Tokenizer:
    """Word-level tokenizer over the vocabulary of the toy world; any other word becomes `<unk>`."""
    words = ["a", "moving", "on", "background", *world.COLORS, *world.SHAPES, *world.DIRECTIONS, *world.BACKGROUNDS]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *(("\u2581" + word, -1.0) for word in words)], extra_ids=0)


def create_text_encoder(seed: int) -> UMT5EncoderModel:
    """A frozen `UMT5EncoderModel` of two layers, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = UMT5Config(
            vocab_size=len(create_tokenizer()), d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4
        )
        return UMT5EncoderModel(config).eval().requires_grad_(False)


@torch.no_grad()
def embed_prompts(tokenizer: T5Tokenizer, text_encoder: UMT5EncoderModel, prompts: Sequence[str]) -> torch.Tensor:
    """Embeddings (B, tokens, TEXT_DIM) of prompts that all have the same number of tokens, without padding."""
    tokens = tokenizer(list(prompts), return_tensors="pt", return_attention_mask=True)
    return text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state


def pad_embeddings(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, tokens, dim) -> (B, MAX_TOKENS, dim), zeros appended, as the pipeline hands them on."""
    return torch.nn.functional.pad(embeddings, (0, 0, 0, MAX_TOKENS - embeddings.shape[1]))
