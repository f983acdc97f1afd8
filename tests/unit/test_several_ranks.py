"""What the command makes of the words by which torchrun tells a process its rank."""

import pytest

from wan_autoregressive.configs import resolve_config
from wan_autoregressive.scripts import several_ranks
from wan_autoregressive.scripts.generate_flags import parse_flags


@pytest.fixture
def second_of_four(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)


def test_alone_nothing_changes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = resolve_config({"device": "cuda:1"})
    assert several_ranks.own_rank() is None
    assert several_ranks.on_own_device(config) is config


def test_a_rank_takes_the_device_of_its_number(second_of_four):
    assert several_ranks.own_rank() == 1
    assert several_ranks.on_own_device(resolve_config({"device": "cuda"})).device == "cuda:1"
    assert several_ranks.on_own_device(resolve_config({"device": "cpu"})).device == "cpu"
    with pytest.raises(ValueError, match="give --device cuda or none"):
        several_ranks.on_own_device(resolve_config({"device": "cuda:0"}))


@pytest.mark.parametrize(
    ("words", "said"), [(["--decode-rank"], "torchrun"), (["--rank-timeout", "0"], "more than 0")]
)
def test_flags_that_mean_nothing_are_refused(words, said, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    arguments = parse_flags(["--prompt", "a fox", "--output", "x.mp4", *words])
    with pytest.raises(ValueError, match=said):
        several_ranks.check(arguments)


def test_a_rank_may_decode(second_of_four):
    several_ranks.check(parse_flags(["--prompt", "a fox", "--output", "x.mp4", "--decode-rank"]))
