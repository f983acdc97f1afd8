"""The list of published checkpoints: every entry, what the reader refuses, and the page made from it."""

import sys
from pathlib import Path

import pytest

from tools import checkpoints_page
from wan_autoregressive.configs import load_preset, preset_names
from wan_autoregressive.configs.checkpoints import (
    CACHE_VARIABLE,
    published_checkpoint,
    published_checkpoints,
    pulled_folder,
    read_checkpoints,
)
from wan_autoregressive.configs.registry import SAMPLERS
from wan_autoregressive.scripts import cli

ENTRY = """
bases:
  Wan-AI/Wan: {license: Apache-2.0, bytes: 23_000_000_000}
checkpoints:
  fox:
    title: Fox
    repo: den/fox
    file: fox.pt
    base: Wan-AI/Wan
    preset: self_forcing
    license: MIT
    bytes: 5_680_000_000
"""


@pytest.mark.parametrize("name", published_checkpoints())
def test_every_entry_has_a_recipe_or_says_what_it_needs(name: str) -> None:
    entry = published_checkpoint(name)
    assert (entry.needs is None) or (entry.unchecked is not None)
    assert entry.non_commercial == ("NC" in entry.license)
    if entry.preset is not None:
        assert entry.preset in preset_names()
        assert {"denoising_steps", "shift", "warp"} <= load_preset(entry.preset).keys()
        assert entry.sampler in SAMPLERS.names


def test_an_entry_is_read() -> None:
    entry = read_checkpoints(ENTRY, "x.yaml")["fox"]
    assert (entry.name, entry.weights, entry.lora, entry.lora_scale) == ("fox", "auto", None, 1.0)
    assert (entry.download_bytes, entry.size_text, entry.sampler) == (28_680_000_000, "about 28.7 GB", "chunkwise")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    title:", "    titel:", "'x.yaml': fox: .*unknown key 'titel'; did you mean 'title'"),
        ("bytes: 5_680_000_000", "bytes: 0", "bytes: must be greater than 0, got 0"),
        ("repo: den/fox", "repo: fox", "repo: String should match pattern"),
        ("    preset: self_forcing\n", "", "it must say preset and bytes, or what it needs"),
        ("base: Wan-AI/Wan", "base: Wan-AI/Wann", "fox: it must name one of the bases Wan-AI/Wan"),
        ("bases:", "basis:", "must hold the two mappings bases and checkpoints"),
        ("fox.pt", "[fox.pt", "is not valid yaml"),
    ],
)
def test_what_the_reader_refuses(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoints(ENTRY.replace(old, new), "x.yaml")
    assert "\n" not in str(caught.value)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/models")
    assert pulled_folder("longlive") == Path("/models/longlive")
    monkeypatch.delenv(CACHE_VARIABLE)
    assert pulled_folder("longlive") == Path.home() / ".cache" / "wan-autoregressive" / "longlive"


def test_the_list_has_every_name_with_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pull", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(published_checkpoints())
    assert all(entry.license_text in line for line, entry in zip(lines, published_checkpoints().values(), strict=True))


def test_a_name_brings_its_preset_unless_there_is_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    def settings(*words: str) -> str:
        assert cli.main(["generate", "--model", "longlive", "--print-config", *words]) == 0
        return capsys.readouterr().out

    assert "window_frames: 12" in settings()
    assert "window_frames: 6" in settings("--window-frames", "6")
    assert "window_frames: null" in settings("--config", "self_forcing")


def test_the_page_is_made_from_the_list() -> None:
    page = checkpoints_page.PAGE.read_text(encoding="utf-8")
    assert page == checkpoints_page.page(), f"run {Path(sys.executable).name} tools/checkpoints_page.py"
