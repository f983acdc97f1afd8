"""Yaml that would take all memory, and what messages show of large values."""

from pathlib import Path

import pytest

from wan_autoregressive.configs import load_preset, resolve_config
from wan_autoregressive.configs.prompt_times import read_changes
from wan_autoregressive.configs.read_yaml import parse_yaml

# 320 bytes, 10**9 strings.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{later}: &{later} [{', '.join([f'*{earlier}'] * 10)}]\n"
    for earlier, later in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_aliases_are_refused_in_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"height: 64\nprompt_changes:\n  {BOMB.replace(chr(10), chr(10) + '  ')}")
    for read in (load_preset, read_changes):
        with pytest.raises(ValueError, match=r"aliases \(\*a\) are not taken") as caught:
            read(str(tmp_path / "a.yaml"))
        assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="aliases"):
        parse_yaml("a: &a {b: 1}\nc: {<<: *a}", "x")
    assert parse_yaml("a: &a 1", "x") == {"a": 1}


def test_a_message_about_a_large_value_is_short() -> None:
    value: list = ["x"]
    for _ in range(30):
        value = [value] * 30
    for settings in ({"height": value}, {"prompt_changes": value}, {"sampler_options": value}, {"seed": "9" * 10**6}):
        with pytest.raises(ValueError, match="got") as caught:
            resolve_config(settings)
        assert len(str(caught.value)) < 400
