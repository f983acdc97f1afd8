"""Prompts with times, as flags and in files."""

import json

import pytest

from wan_autoregressive.configs import resolve_config
from wan_autoregressive.configs.prompt_times import latent_frame_at, read_changes, split_timed_prompts

NEEDED = {"model": "m", "output": "o.mp4", "prompt": "a fox"}


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["a fox"], ("a fox", {})),
        (["a fox: the movie"], ("a fox: the movie", {})),
        (["0: a fox"], ("a fox", {})),
        (["0: a fox", "5s: it snows", "30: night"], ("a fox", {"5s": "it snows", "30": "night"})),
        (["2.5s: later", "0s: a fox"], ("a fox", {"2.5s": "later"})),
    ],
)
def test_splits(prompts, expected):
    assert split_timed_prompts(prompts) == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a fox", "5s: it snows"], "'a fox' has no time"),
        (["5s: it snows"], "no prompt starts at 0"),
        (["0: a", "3: b", "3: c"], "two prompts start at 3"),
    ],
)
def test_refuses_to_guess(prompts, message):
    with pytest.raises(ValueError, match=message):
        split_timed_prompts(prompts)


@pytest.mark.parametrize(("time", "frame"), [("0", 0), ("30", 30), ("0s", 0), ("5s", 20), ("0.1s", 1), ("2.5s", 10)])
def test_times_are_latent_frames_or_seconds(time, frame):
    assert latent_frame_at(time, fps=16) == frame


@pytest.mark.parametrize("time", ["", "s", "-1", "1.5", "5m", "five"])
def test_refuses_other_times(time):
    with pytest.raises(ValueError, match="neither seconds"):
        latent_frame_at(time, fps=16)


def test_changes_come_from_a_file_or_a_mapping(tmp_path):
    changes = {"5s": "it snows", "30": "night"}
    (tmp_path / "a.json").write_text(json.dumps(changes))
    (tmp_path / "a.yaml").write_text("5s: it snows\n30: night\n")
    for source in (str(tmp_path / "a.json"), str(tmp_path / "a.yaml"), changes):
        config = resolve_config({**NEEDED, "prompt_changes": source, "fps": 8})
        assert config.prompt_schedule() == {10: "it snows", 30: "night"}


@pytest.mark.parametrize("content", ["- a list\n", "{", "text"])
def test_refuses_files_of_other_things(tmp_path, content):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"a\.yaml"):
        read_changes(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("changes", [{"0": "x"}, {"16s": "x", "64": "y"}, {"3": " "}, {"soon": "x"}])
def test_refuses_changes_that_are_none(changes):
    with pytest.raises(ValueError, match=r"prompt_changes|neither seconds"):
        resolve_config({**NEEDED, "prompt_changes": changes})
