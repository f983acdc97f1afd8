"""Two ranks, or three, make the flow of one process; a rank's cache holds its heads, and no more is sent than said."""

from typing import Any

import parallel_models as models
import parallel_videos as videos
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from wan_autoregressive import CausalWanTransformer3DModel
from wan_autoregressive.models.sequence_parallel import shares

QUICK = ["absolute", "int8, sink_relative", "a timestep per frame", "neither divides", "fewer tokens than ranks"]


def test_two_ranks_in_short(tmp_path):
    """The one launch of the quick suite: some forwards, and a video that is saved."""
    found = run_ranks(videos.short_launch, 2, tmp_path / "ranks", QUICK, tmp_path)
    check_models([rank["models"] for rank in found], QUICK)
    videos.check_saved_as_one(videos.demo(), found[0]["saved"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_every_kind_of_forward(count, tmp_path):
    names = list(models.CASES)
    check_models(run_ranks(models.model_launch, count, tmp_path / "ranks", names), names)


def check_models(found: list[dict[str, Any]], names: list[str]) -> None:
    """What the ranks found is what it should be."""
    for rank in found:
        assert rank["there_and_back"] == [(True, True)] * 4
    for name in names:
        _check_case(models.CASES[name], [rank["cases"][name] for rank in found], name)
    for name, (_, case) in models.MISTAKES.items():
        right, _ = models.flows(models.prepared(case), case)
        assert (found[0]["mistakes"][name] - right).abs().max() > 1e-4, name
    for rank, (heads, stranger) in enumerate(rank["errors"] for rank in found):
        assert f"1 heads cannot be shared by {len(found)} ranks" in heads
        assert ("is not in the group" in stranger) == (rank > 0)


def _check_case(case: models.Case, ranks: list[dict[str, Any]], name: str) -> None:
    expected, cache = models.flows(models.prepared(case), case)
    assert all(torch.equal(rank["flows"], ranks[0]["flows"]) for rank in ranks), name
    atol = 1e-3 if "kv_dtype" in case.cache else 1e-5
    torch.testing.assert_close(ranks[0]["flows"], expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")
    for rank, heads in zip(ranks, shares(case.heads, len(ranks)), strict=True):
        assert rank["cache_bytes"] * case.heads == cache.allocated_bytes * heads, name
        if rank["expected_bytes"] is not None:
            assert rank["cache_bytes"] == rank["expected_bytes"], name
    if len(set(case.chunks)) == 1:
        _check_what_is_sent(case, ranks, name)


def _check_what_is_sent(case: models.Case, ranks: list[dict[str, Any]], name: str) -> None:
    """The formula in the docstring of the module, and what it becomes where tokens or heads do not divide."""
    forwards, tokens = len(case.chunks) * len(models.TIMESTEPS), case.tokens_per_frame * case.chunks[0]
    dim, count = case.heads * models.HEAD_DIM, len(ranks)
    for rank, heads, own_tokens in zip(ranks, shares(case.heads, count), shares(tokens, count), strict=True):
        assert rank["exchanges"] == 2 * models.LAYERS * forwards, name
        assert rank["gathers"] == forwards, name
        sent = 3 * own_tokens * (case.heads - heads) + (tokens - own_tokens) * heads
        sent *= models.HEAD_DIM * 4 * case.batch
        assert rank["sent_bytes"] == sent * models.LAYERS * forwards, name
        if tokens % count == 0 and case.heads % count == 0:
            assert sent * count**2 == 4 * tokens * dim * 4 * case.batch * (count - 1), name


@pytest.mark.slow
def test_weights_split_over_the_same_ranks(tmp_path):
    found = run_ranks(models.split_weights_launch, 2, tmp_path / "ranks")
    expected, cache = models.flows(models.small_model(layers=4), models.CASES["sink_relative"])
    for name, share in (("alone", 1), ("with the exchange", 2)):
        for rank in found:
            torch.testing.assert_close(rank[name]["flows"], expected, rtol=0, atol=1e-5)
            assert rank[name]["cache_bytes"] * share == cache.allocated_bytes
            assert rank[name]["fingerprint"] == rank["whole"][0]
        assert sum(rank[name]["held"] for rank in found) == found[0]["whole"][1]


@pytest.mark.slow
@pytest.mark.parametrize("position_mode", ["absolute", "relative"])
def test_compiled_blocks_have_the_exchange_in_them(position_mode, tmp_path):
    found = run_ranks(models.compiled_launch, 2, tmp_path / "ranks", {"position_mode": position_mode})
    for rank in found:
        torch.testing.assert_close(rank["compiled"], rank["eager"], rtol=0, atol=1e-5)
        assert len(set.union(*rank["graphs"].values())) <= 5


@given(total=st.integers(0, 10_000), ranks=st.integers(1, 64))
def test_shares_are_even_and_whole(total, ranks):
    found = shares(total, ranks)
    assert sum(found) == total
    assert len(found) == ranks
    assert max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)


def test_upstreams_own_parallelism_is_refused_by_name():
    model = models.small_model()
    with pytest.raises(ValueError, match=r"set_sequence_parallel\(group\)"):
        model.enable_parallelism(config=object())
    assert CausalWanTransformer3DModel._cp_plan is None


def test_none_turns_it_off():
    case = models.Case(chunks=(3, 3))
    expected, _ = models.flows(models.prepared(case), case)
    model = models.prepared(case)
    model.set_sequence_parallel(None)
    assert torch.equal(models.flows(model, case)[0], expected)
