"""The rolling cache against a naive list of tokens, and its refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_autoregressive import WanKVCache

HEADS, HEAD_DIM = 2, 4


def chunk(tokens: int, value: float, batch: int = 1, heads: int = HEADS, dtype=torch.float32):
    """K and V of `tokens` tokens, every token with a number of its own."""
    numbers = value + torch.arange(tokens, dtype=dtype) / 1000
    key = numbers.view(1, tokens, 1, 1).expand(batch, tokens, heads, HEAD_DIM).contiguous()
    return key, -key


class Token:
    """A place in the list. What it holds may be overwritten."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class ListOfTokens:
    """What the cache should hold, by the slowest means."""

    def __init__(self, window: int, sink: int) -> None:
        self.window, self.sink = window, sink
        self.tokens: list[Token] = []
        self.pins: dict[str, list[Token]] = {}
        self.newest = 0

    def can_append(self, count: int) -> bool:
        pinned = {id(token) for tokens in self.pins.values() for token in tokens}
        beside_sink = sum(id(token) in pinned for token in self.tokens[self.sink :])
        return self.window == -1 or self.sink + beside_sink + count <= self.window

    def append(self, key: torch.Tensor) -> None:
        new = [Token(value) for value in key.unbind(dim=1)]
        surplus = 0 if self.window == -1 else max(0, len(self.tokens) + len(new) - self.window)
        pinned = {id(token) for tokens in self.pins.values() for token in tokens}
        for _ in range(surplus):
            place = next(i for i, token in enumerate(self.tokens) if i >= self.sink and id(token) not in pinned)
            del self.tokens[place]
        self.tokens += new
        self.newest = len(new)

    def overwrite(self, key: torch.Tensor) -> None:
        for token, value in zip(self.tokens[-self.newest :], key.unbind(dim=1), strict=True):
            token.value = value

    def rewrite(self, key: torch.Tensor, keep_sink: bool) -> None:
        kept = self.tokens[: self.sink] if keep_sink else []
        self.tokens = kept + [Token(value) for value in key.unbind(dim=1)]
        self.newest, self.pins = key.shape[1], {}

    def keep_newest(self, count: int) -> None:
        rest = self.tokens[self.sink :]
        gone = rest[: max(0, len(rest) - count)]
        if any(token in gone for token in self.tokens[len(self.tokens) - self.newest :]):
            self.newest = 0
        self.tokens = self.tokens[: self.sink] + rest[len(gone) :]
        self.pins = {}

    def pin(self, name: str, count: int) -> None:
        start = len(self.tokens) - self.newest
        self.pins[name] = self.tokens[start : start + count]

    @property
    def values(self) -> torch.Tensor:
        """`(1, tokens, heads, head_dim)`"""
        return torch.stack([token.value for token in self.tokens], dim=1)


OPERATIONS = [
    *("append", "append", "append", "append", "overwrite", "rewrite", "rewrite_all", "keep_newest", "reset"),
    *("pin a", "pin a", "pin b", "unpin a", "unpin b"),
]


@st.composite
def histories(draw):
    windowed = draw(st.booleans())
    largest = draw(st.integers(1, 6))
    sink = draw(st.integers(0, 4)) if windowed else 0
    window = sink + largest + draw(st.integers(0, 12)) if windowed else -1
    operations = draw(
        st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(1, largest)), min_size=1, max_size=40)
    )
    return window, sink, operations


def same(got: torch.Tensor, expected: torch.Tensor, kv_dtype: str | None) -> bool:
    """Equal; as int8, where every number here is the largest of its token, but for the product with the scale."""
    return torch.equal(got, expected) if kv_dtype is None else torch.allclose(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@settings(max_examples=300, deadline=None)
@given(history=histories())
def test_any_sequence_of_operations_equals_a_list_of_tokens(kv_dtype, history):
    window, sink, operations = history
    cache = WanKVCache(num_blocks=2, window_size=window, sink_size=sink, kv_dtype=kv_dtype)
    model = ListOfTokens(window, sink)
    for number, (operation, tokens) in enumerate(operations, start=1):
        if operation == "reset":
            cache.reset()
            model = ListOfTokens(window, sink)
            assert cache.block_caches[0].cached_key is None
            continue
        if operation == "keep_newest":
            cache.keep_newest(tokens)
            model.keep_newest(tokens)
            assert cache.newest_tokens == model.newest
            continue
        if operation.startswith("pin"):
            count = min(tokens, model.newest)
            cache.pin_newest(operation[4:], count)
            model.pin(operation[4:], count)
            continue
        if operation.startswith("unpin"):
            if model.pins.pop(operation[6:], None) is not None:
                cache.unpin(operation[6:])
            continue
        if operation == "overwrite":
            if model.newest == 0:
                continue
            tokens = model.newest
        key, value = chunk(tokens, number)
        if operation == "append":
            cache.enable_append_mode()
            if not model.can_append(tokens):
                with pytest.raises(ValueError, match="pinned ones and a sink of"):
                    cache.update(0, key, value)
                continue
            model.append(key)
        elif operation == "overwrite":
            cache.enable_overwrite_mode()
            model.overwrite(key)
        else:
            cache.enable_rewrite_mode(keep_sink=operation == "rewrite")
            model.rewrite(key, keep_sink=operation == "rewrite")
        expected = model.values
        for block in range(2):
            attended_key, attended_value = cache.update(block, key, value)
            # Attention sees exactly these tokens, in any order ...
            assert same(attended_key[0, :, 0, 0].sort().values, expected[0, :, 0, 0].sort().values, kv_dtype)
            assert torch.equal(attended_value, -attended_key)
            # ... and the cache knows their order in time.
            assert same(cache.block_caches[block].cached_key, expected, kv_dtype)
            assert same(cache.block_caches[block].cached_value, -expected, kv_dtype)
        assert cache.num_tokens == len(model.tokens)


def test_window_evicts_per_frame_before_attention():
    # Window 7, sink 1, chunks of 3 frames (1 token each): [0, 3..8], then [0, 6..11].
    cache = WanKVCache(num_blocks=1, window_size=7, sink_size=1)
    seen = []
    for start in range(0, 12, 3):
        numbers = torch.arange(start, start + 3, dtype=torch.float32).view(1, 3, 1, 1)
        attended, _ = cache.update(0, numbers, numbers)
        seen.append(sorted(attended.flatten().int().tolist()))
    assert seen == [[0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 3, 4, 5, 6, 7, 8], [0, 6, 7, 8, 9, 10, 11]]


def test_pinned_tokens_stay_until_others_take_their_place():
    # Window 9, sink 1, chunks of 2 frames (1 token each); the chunk of frames 4 and 5 is pinned, then that of 12.
    cache = WanKVCache(num_blocks=1, window_size=9, sink_size=1)
    seen = []
    for start in range(0, 20, 2):
        numbers = torch.arange(start, start + 2, dtype=torch.float32).view(1, 2, 1, 1)
        cache.update(0, numbers, numbers)
        seen.append(cache.block_caches[0].cached_key.flatten().int().tolist())
        if start in (4, 12):
            cache.pin_newest("shot", 2)
    assert seen[5:] == [
        [0, 4, 5, 6, 7, 8, 9, 10, 11],
        [0, 4, 5, 8, 9, 10, 11, 12, 13],
        [0, 8, 9, 10, 11, 12, 13, 14, 15],
        [0, 10, 11, 12, 13, 14, 15, 16, 17],
        [0, 12, 13, 14, 15, 16, 17, 18, 19],
    ]


@pytest.mark.parametrize("pinned", [0, 2])
def test_windowed_buffers_are_allocated_once_and_never_move(pinned):
    cache = WanKVCache(num_blocks=2, window_size=8, sink_size=2)
    expected_bytes = cache.expected_bytes(1, HEADS, HEAD_DIM, torch.float32)
    addresses = set()
    for number in range(10):
        for block in range(2):
            key, value = cache.update(block, *chunk(3, number))
            addresses.add((block, key.data_ptr(), value.data_ptr()))
        cache.pin_newest("shot", pinned)
        assert cache.allocated_bytes == expected_bytes == 2 * 2 * 8 * HEADS * HEAD_DIM * 4
    assert len(addresses) == 2
    cache.reset()
    assert cache.allocated_bytes == expected_bytes
    cache.update(0, *chunk(3, 0))
    assert cache.block_caches[0].cached_key.data_ptr() in {address for _, address, _ in addresses}
    cache.release()
    assert cache.allocated_bytes == 0


def test_unbounded_cache_with_known_length_never_moves():
    cache = WanKVCache(num_blocks=1, max_tokens=12)
    addresses = {cache.update(0, *chunk(3, number))[0].data_ptr() for number in range(4)}
    assert len(addresses) == 1
    assert cache.allocated_bytes == cache.expected_bytes(1, HEADS, HEAD_DIM, torch.float32)


def test_unbounded_cache_grows_geometrically():
    cache = WanKVCache(num_blocks=1)
    sizes = set()
    for number in range(64):
        cache.update(0, *chunk(2, number))
        sizes.add(cache.allocated_bytes)
    assert len(sizes) == 7  # 2, 4, 8, ... 128 tokens
    assert cache.num_tokens == 128


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": 1, "window_size": 0}, "window_size is 0"),
        ({"num_blocks": 1, "window_size": -2}, "window_size is -2"),
        ({"num_blocks": 1, "window_size": 4, "sink_size": -1}, "sink_size is -1"),
        ({"num_blocks": 1, "sink_size": 2}, "window_size is -1"),
        ({"num_blocks": 1, "window_size": 4, "sink_size": 4}, "leaves no room"),
        ({"num_blocks": 1, "window_size": 4, "max_tokens": 4}, "max_tokens is 4"),
        ({"num_blocks": 1, "max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_refuses_sizes_that_cannot_work(sizes, message):
    with pytest.raises(ValueError, match=message):
        WanKVCache(**sizes)


@pytest.mark.parametrize(
    ("mode", "new_chunk", "message"),
    [
        ("overwrite", chunk(2, 9), "overwrite with 2 tokens, but the newest chunk has 3"),
        ("append", chunk(9, 9), "a chunk of 9 tokens and a sink of 1 do not fit in a window of 8"),
        ("append", chunk(8, 9), "a chunk of 8 tokens and a sink of 1 do not fit in a window of 8"),
        ("rewrite", chunk(8, 9), "a rewrite of 8 tokens behind 1 kept ones"),
        ("append", chunk(3, 9, batch=2), "reset"),
        ("append", chunk(3, 9, heads=1), "reset"),
        ("append", chunk(3, 9, dtype=torch.float64), "torch.float64"),
        ("append", (chunk(3, 9)[0], chunk(2, 9)[1]), "must both be"),
        ("append", (chunk(3, 9)[0], chunk(3, 9)[1].double()), "value is torch.float64"),
        ("append", (chunk(3, 9)[0][0], chunk(3, 9)[1][0]), "must both be"),
    ],
)
def test_a_refused_update_changes_nothing(mode, new_chunk, message):
    cache = WanKVCache(num_blocks=1, window_size=8, sink_size=1)
    cache.update(0, *chunk(3, 1))
    cache.update(0, *chunk(3, 2))
    before = cache.block_caches[0].cached_key.clone()
    getattr(cache, f"enable_{mode}_mode")()
    with pytest.raises(ValueError, match=message):
        cache.update(0, *new_chunk)
    assert torch.equal(cache.block_caches[0].cached_key, before)
    # The right update still works afterwards.
    cache.enable_append_mode()
    cache.update(0, *chunk(3, 3))
    assert cache.num_tokens == 8


def test_overwrite_before_any_append_is_refused():
    cache = WanKVCache(num_blocks=1)
    cache.enable_overwrite_mode()
    with pytest.raises(ValueError, match="overwrite before any append"):
        cache.update(0, *chunk(3, 1))
    cache.enable_append_mode()
    cache.update(0, *chunk(3, 1))
    cache.reset()
    cache.enable_overwrite_mode()
    with pytest.raises(ValueError, match="overwrite before any append"):
        cache.update(0, *chunk(3, 1))


def test_what_cannot_be_pinned_is_refused():
    cache = WanKVCache(num_blocks=1, window_size=8, sink_size=1, position_mode="sink_relative")
    cache.update(0, *chunk(3, 1))
    with pytest.raises(ValueError, match="'sink_relative' moves only the sink"):
        cache.pin_newest("shot", 2)
    cache = WanKVCache(num_blocks=1, window_size=8, sink_size=1)
    cache.update(0, *chunk(3, 1))
    with pytest.raises(ValueError, match="cannot pin 4 tokens of a newest chunk that has 3"):
        cache.pin_newest("shot", 4)


def test_unknown_block_is_refused():
    with pytest.raises(ValueError, match="block_idx is 2; this cache has blocks 0 to 1"):
        WanKVCache(num_blocks=2).update(2, *chunk(1, 0))


def test_a_new_video_may_have_another_shape():
    cache = WanKVCache(num_blocks=1, window_size=6)
    cache.update(0, *chunk(3, 1))
    cache.reset()
    key, _ = cache.update(0, *chunk(3, 1, batch=2))
    assert key.shape == (2, 3, HEADS, HEAD_DIM)


def test_a_forward_that_failed_can_be_repeated():
    cache, undisturbed = (WanKVCache(num_blocks=2, window_size=6) for _ in range(2))
    for number in range(3):
        for block in range(2):
            undisturbed.update(block, *chunk(3, number))
    for number in range(2):
        for block in range(2):
            cache.update(block, *chunk(3, number))
    cache.begin_forward(num_tokens=3)[0].write(*chunk(3, 99))  # block 1 never ran: not committed
    for block_cache in cache.begin_forward(num_tokens=3):
        block_cache.write(*chunk(3, 2))
    cache.end_forward()
    for got, expected in zip(cache.block_caches, undisturbed.block_caches, strict=True):
        assert torch.equal(got.cached_key, expected.cached_key)


def test_refuses_to_record_gradients():
    key, value = chunk(3, 1)
    with pytest.raises(RuntimeError, match="no_grad"):
        WanKVCache(num_blocks=1).update(0, key.requires_grad_(), value)


def test_has_no_to_method():
    # accelerate's hooks move everything that has one, the whole past at every forward.
    assert not hasattr(WanKVCache(num_blocks=1), "to")
    assert not hasattr(WanKVCache(num_blocks=1).block_caches[0], "to")
