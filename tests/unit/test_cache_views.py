"""Forwards that keep nothing or only their first tokens, and see a part of the past, against a list of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_autoregressive import WanKVCache
from wan_autoregressive.cache import PastView


class ListOfTokens:
    """What the cache should hold and what attention should see, by the slowest means."""

    def __init__(self, window: int, sink: int) -> None:
        self.window, self.sink = window, sink
        self.tokens: list[float] = []
        self.newest = 0

    def forward(self, new: list[float], append: bool, keep: int | None, view: PastView | None) -> list[float]:
        """The tokens seen, own ones last."""
        kept = len(new) if keep is None else keep
        if append and kept:
            surplus = 0 if self.window == -1 else max(0, len(self.tokens) + kept - self.window)
            self.tokens = self.tokens[: self.sink] + self.tokens[self.sink + surplus :]
            past, self.newest = list(self.tokens), kept
            self.tokens += new[:kept]
        else:
            past = self.tokens if append else self.tokens[: len(self.tokens) - self.newest]
            if kept:
                self.tokens = past + new[:kept]
        if view is not None:
            newest = len(past) if view.newest is None else view.newest
            seen = range(max(0, len(past) - newest), len(past))
            past = [token for i, token in enumerate(past) if i in seen or (view.sink and i < self.sink)]
        return past + new


views = st.one_of(st.none(), st.builds(PastView, st.one_of(st.none(), st.integers(0, 12)), st.booleans()))


@st.composite
def histories(draw):
    windowed = draw(st.booleans())
    largest = draw(st.integers(1, 5))
    sink = draw(st.integers(0, 3)) if windowed else 0
    window = sink + largest + draw(st.integers(0, 8)) if windowed else -1
    forward = st.tuples(
        st.booleans(), st.integers(1, largest + 4), st.one_of(st.none(), st.integers(0, largest)), views
    )
    return window, sink, largest, draw(st.lists(forward, min_size=1, max_size=25))


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@settings(max_examples=100, deadline=None)
@given(history=histories())
def test_any_sequence_of_forwards_equals_a_list_of_tokens(kv_dtype, history):
    window, sink, largest, forwards = history
    cache = WanKVCache(num_blocks=1, window_size=window, sink_size=sink, kv_dtype=kv_dtype)
    model = ListOfTokens(window, sink)
    for number, (append, count, keep, view) in enumerate(forwards, start=1):
        if not append and model.newest == 0:
            continue
        if keep is None:
            count = min(count, largest) if append else model.newest
        elif keep and not append:
            keep = model.newest
            count = max(count, keep)
        else:
            count = max(count, keep)
        new = [number + i / 100 for i in range(count)]
        (cache.enable_append_mode if append else cache.enable_overwrite_mode)()
        expected = model.forward(new, append, keep, view)
        (block,) = cache.begin_forward(count, keep=keep, view=view)
        key = torch.tensor(new).view(1, count, 1, 1)
        seen_key, seen_value = block.write(key, -key)
        cache.end_forward()
        assert torch.equal(seen_key, -seen_value)
        got = seen_key.flatten()
        if keep in (None, count) and view is None:  # in slot order
            torch.testing.assert_close(got.sort().values, torch.tensor(expected).sort().values, rtol=1e-6, atol=0)
        else:
            torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=0)
        held = block.cached_key
        assert (0 if held is None else held.shape[1]) == len(model.tokens)
        if held is not None:
            torch.testing.assert_close(held.flatten(), torch.tensor(model.tokens), rtol=1e-6, atol=0)


def test_a_forward_that_keeps_nothing_evicts_nothing():
    cache = WanKVCache(num_blocks=1, window_size=4, sink_size=1)
    key = torch.arange(4.0).view(1, 4, 1, 1)
    for tokens in (key[:, :3], key[:, 3:]):
        cache.update(0, tokens, tokens)
    (block,) = cache.begin_forward(3, keep=0)
    seen, _ = block.write(10 + key[:, :3], key[:, :3])
    cache.end_forward()
    assert seen.flatten().tolist() == [0, 1, 2, 3, 10, 11, 12]
    assert block.cached_key.flatten().tolist() == [0, 1, 2, 3]


def test_refuses_to_keep_more_than_there_is_and_a_rewrite_that_keeps_less():
    cache = WanKVCache(num_blocks=1)
    with pytest.raises(ValueError, match="keep is 4; of a chunk of 3 tokens 0 to 3 can be kept"):
        cache.begin_forward(3, keep=4)
    cache.enable_rewrite_mode()
    with pytest.raises(ValueError, match="a rewrite keeps all of its 3 tokens"):
        cache.begin_forward(3, keep=1)
