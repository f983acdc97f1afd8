"""Two ranks, or three, make the flow of one process; a rank's cache holds its heads, and no more is sent than said."""

import parallel_models as models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from wan_autoregressive import CausalWanTransformer3DModel
from wan_autoregressive.models.sequence_parallel import shares

QUICK = ["absolute", "int8, sink_relative", "a timestep per frame", "neither divides", "fewer tokens than ranks"]

NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in models.CASES]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def launched(request, tmp_path_factory) -> tuple[int, list[dict]]:
    """How many ranks, and what each of them found."""
    names = QUICK if request.config.getoption("-m") == "not slow" else list(models.CASES)
    return request.param, run_ranks(models.model_launch, request.param, tmp_path_factory.mktemp("ranks"), names)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple]:
    """Flows and cache of one process, as they are asked for."""
    found: dict[str, tuple] = {}

    def of(case: models.Case):
        return found.setdefault(repr(case), models.flows(models.prepared(case), case))

    return of


@given(total=st.integers(0, 10_000), ranks=st.integers(1, 64))
def test_shares_are_even_and_whole(total, ranks):
    found = shares(total, ranks)
    assert sum(found) == total
    assert len(found) == ranks
    assert max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)


def test_the_exchange_gives_own_heads_and_goes_back(launched):
    _, found = launched
    assert [rank["there_and_back"] for rank in found] == [[(True, True)] * 4] * len(found)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_make_the_flow_of_one_process(launched, alone, name):
    count, found = launched
    ranks, case = [rank["cases"][name] for rank in found], models.CASES[name]
    expected, cache = alone(case)
    assert all(torch.equal(rank["flows"], ranks[0]["flows"]) for rank in ranks)
    atol = 1e-3 if "kv_dtype" in case.cache else 1e-5
    torch.testing.assert_close(ranks[0]["flows"], expected, rtol=0, atol=atol)
    for rank, heads in zip(ranks, shares(case.heads, count), strict=True):
        assert rank["cache_bytes"] * case.heads == cache.allocated_bytes * heads
        if rank["expected_bytes"] is not None and case.cache.get("sink_update") is None:
            assert rank["cache_bytes"] == rank["expected_bytes"]


def test_no_more_is_sent_than_said(launched):
    """The formula in the module's docstring, and what it becomes where heads do not divide."""
    count, found = launched
    for name in QUICK:
        case = models.CASES[name]
        forwards = len(case.chunks) * len(models.TIMESTEPS)
        tokens = case.tokens_per_frame * case.chunks[0]
        for rank, heads in enumerate(shares(case.heads, count)):
            counted = found[rank]["cases"][name]
            assert counted["exchanges"] == 2 * models.LAYERS * forwards
            assert counted["gathers"] == forwards
            own_tokens = shares(tokens, count)[rank]
            sent = 3 * own_tokens * (case.heads - heads) + (tokens - own_tokens) * heads
            sent *= models.HEAD_DIM * 4 * case.batch
            assert counted["sent_bytes"] == sent * models.LAYERS * forwards
            if tokens % count == 0 and case.heads % count == 0:
                dim = case.heads * models.HEAD_DIM
                assert sent * count**2 == 4 * tokens * dim * 4 * case.batch * (count - 1)


@pytest.mark.parametrize("name", models.MISTAKES)
def test_a_mistake_would_show(launched, alone, name):
    _, found = launched
    expected, _ = alone(models.MISTAKES[name][1])
    assert (found[0]["mistakes"][name] - expected).abs().max() > 1e-4


def test_too_few_heads_and_strangers_are_refused(launched):
    count, found = launched
    for rank, (heads, stranger) in enumerate(ranks["errors"] for ranks in found):
        assert f"1 heads cannot be shared by {count} ranks" in heads
        assert ("is not in the group" in stranger) == (rank > 0)


def test_upstreams_own_parallelism_is_refused_by_name():
    model = models.small_model()
    with pytest.raises(ValueError, match=r"set_sequence_parallel\(group\)"):
        model.enable_parallelism(config=object())
    assert CausalWanTransformer3DModel._cp_plan is None


def test_none_turns_it_off(alone):
    case = models.Case()
    model = models.prepared(case)
    model.set_sequence_parallel(None)
    assert torch.equal(models.flows(model, case)[0], alone(case)[0])
