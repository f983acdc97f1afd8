"""The one list of settings: its keywords, its names, its refusals, and that it needs no torch."""

import dataclasses
import subprocess
import sys
import typing

import pytest

from wan_autoregressive.configs.registry import Registry
from wan_autoregressive.configs.rollout_config import RolloutConfig, RolloutSettings


def test_keywords_are_the_fields():
    fields = {field.name: field.type for field in dataclasses.fields(RolloutConfig)}
    keywords = RolloutSettings.__annotations__
    assert list(keywords) == list(fields)
    may_be_left_open = {"height", "width", "denoising_steps", "first_chunk_steps"}
    hints = typing.get_type_hints(RolloutConfig), typing.get_type_hints(RolloutSettings)
    assert {name for name in fields if hints[0][name] != hints[1][name]} == may_be_left_open


def test_settings_need_no_torch():
    code = "import sys, wan_autoregressive.configs.rollout_config as r; r.RolloutConfig(64, 64); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_step_lists_become_tuples():
    assert RolloutConfig(64, 64, denoising_steps=[1000, 500]).denoising_steps == (1000, 500)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampler": "rollng"}, "sampler is 'rollng'; allowed are chunkwise"),
        (
            {"switch_policy": "melt"},
            "switch_policy is 'melt'; allowed are recache, cross_attention, flush",
        ),
        ({"output_type": "gif"}, "output_type is 'gif'; allowed are np, pil, pt, uint8, latent"),
        ({"window_frames": 3, "sink_frames": 1}, "it must be at least 4"),
        ({"sink_frames": 1}, "Set window_frames or leave the sink out"),
    ],
)
def test_refusals_name_what_is_allowed(settings, words):
    with pytest.raises(ValueError, match=words):
        RolloutConfig(64, 64, **settings)


def test_a_registered_name_is_allowed_and_another_class_under_it_refused():
    registry = Registry("sampler", {"decimal": "decimal:Decimal"})
    assert registry.load("decimal").__name__ == "Decimal"
    registry.register("mine", int)
    assert registry.names == ("decimal", "mine")
    assert registry.load("mine") is int
    with pytest.raises(ValueError, match="sampler 'mine' is taken"):
        registry.register("mine", float)
