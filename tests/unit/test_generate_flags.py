"""The flags of `wan-ar generate`: every setting under one name in Python, in a file and on the command line."""

import dataclasses
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from wan_autoregressive.configs import SETTING_NAMES, load_preset, resolve_config, rollout_config
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.scripts import cli
from wan_autoregressive.scripts.generate_flags import parse_flags

# Values beside the defaults, as words of the command line; what is not here is made from the default.
OTHER_WORDS = {
    **{"height": "64", "width": "96", "num_frames": "29", "kv_dtype": "int8", "strength": "0.5", "window_frames": "9"},
    **{"denoising_steps": "900,400", "first_chunk_steps": "800", "num_inference_steps": "2", "sink_frames": "1"},
    **{"position_mode": "relative", "sink_update": "moving_average", "switch_policy": "flush", "sink_decay": "0.5"},
    **{"recache_sink": "refresh", "output_type": "np", "first_chunk_frames": "1"},
}
# Fields that are refused without others.
NEEDED: dict[str, list[str]] = {
    "strength": ["--video", "clip.mp4"],
    "sink_frames": ["--window-frames", "9"],
    "sink_update": ["--window-frames", "9", "--sink-frames", "1", "--position-mode", "relative"],
}


def parse(*words: str) -> Any:
    arguments = parse_flags(words)
    assert arguments is not None
    return arguments


def words_for(name: str) -> list[str]:
    default = RolloutConfig.__dataclass_fields__[name].default
    flag = name.replace("_", "-")
    if isinstance(default, bool):
        return [f"--{'no-' if default else ''}{flag}"]
    if name.endswith("_options"):
        return [f"--{flag}.some_frames", "6"]
    # Names from a registry stay as they are: others are refused below, and may need more settings.
    word = OTHER_WORDS.get(name) or (str(default + 1) if isinstance(default, int | float) else default)
    return [f"--{flag}", str(word)]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RolloutConfig)])
def test_every_setting_of_a_rollout_has_one_name(name: str, tmp_path: Path) -> None:
    needed = NEEDED.get(name, [])
    from_flags = parse("--model", "m", *needed, *words_for(name)).config
    value = getattr(from_flags.rollout, name)
    assert isinstance(value, str) or value != getattr(resolve_config({}).rollout, name)
    others = {flag[2:].replace("-", "_"): word for flag, word in zip(needed[::2], needed[1::2], strict=True)}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({name: list(value) if isinstance(value, tuple) else value}))
    for layer in ({name: value}, load_preset(str(tmp_path / "a.yaml"))):
        assert resolve_config({"model": "m"}, others, layer) == from_flags


def test_a_new_setting_is_a_new_flag(tmp_path: Path) -> None:
    """A copy of the settings with one more, found before the real ones, in a process of its own."""
    source = inspect.getsource(rollout_config)
    before = "    park_vae_state: bool = False\n"
    assert source.count(before) == 1
    more = f'    num_wheels: int = 4\n    """How many wheels."""\n{before}'
    (tmp_path / "longer.py").write_text(source.replace(before, more))
    code = """
        import sys
        from importlib.util import spec_from_file_location

        class Finder:
            def find_spec(name, path, target=None):
                return spec_from_file_location(name, sys.argv[1]) if name.endswith("configs.rollout_config") else None

        sys.meta_path.insert(0, Finder)
        from wan_autoregressive.configs import resolve_config
        from wan_autoregressive.scripts.generate_flags import parse_flags
        print(parse_flags(["--num-wheels", "6"]).config.rollout_settings()["num_wheels"])
        print(resolve_config({"num_wheels": 7}).model_dump()["num_wheels"])
        parse_flags(["--help"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "longer.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["6", "7"]
    assert "How many wheels. (default: 4)" in done.stdout


def test_options_of_a_sampler_are_typed_as_in_a_file() -> None:
    words = ["--sampler-options.context_frames", "6", "--sampler-options.decay", "2.5", "--sampler_options.on", "true"]
    assert parse(*words).config.rollout.sampler_options == {"context_frames": 6, "decay": 2.5, "on": True}
    assert parse("--switch-options", '{"a": 3}').config.rollout.switch_options == {"a": 3}


def test_flags_come_on_top_of_a_file_and_that_on_top_of_the_demo(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("window_frames: 9\nfps: 8\nnum_inference_steps: 2\n")
    config = parse("--config", str(tmp_path / "a.yaml"), "--fps", "4", "--steps", "2").config
    demo = load_preset("demo")
    assert (config.rollout.height, config.rollout.window_frames, config.fps) == (demo["height"], 9, 4)
    assert (config.rollout.denoising_steps, config.rollout.num_inference_steps) == ((1000, 500), None)
    assert parse("--model", "other").config.rollout.height == resolve_config({}).rollout.height
    assert parse("--fps", "4", "--fps", "5").config.fps == 5  # a script may add to a command


def test_a_printed_config_is_a_file_for_config(tmp_path: Path, capsys) -> None:
    words = ["generate", "--config", "longlive", "--seed", "3", "--sampler-options.a", "1", "--print-config"]
    assert cli.main(words) == 0
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["generate", "--config", str(tmp_path / "a.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "a.yaml").read_text()


def test_the_help_has_everything_once_and_everyday_flags_first(capsys) -> None:
    assert parse_flags(["--help"]) is None
    out = capsys.readouterr().out
    everyday = out[out.index("Everyday") : out.index("This run")]
    assert everyday.count("--") == 10
    for name in SETTING_NAMES:
        assert f" --{name.replace('_', '-')} " in out
    text = " ".join(word for word in out.split() if word != "│")
    assert "Latent frames denoised together. (default: 3)" in text
    assert "First latent frames that are never evicted. (default: 0)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-frame", "5"], "Did you mean --num-frames?"),
        (["--kv-dtype", "int4"], 'Choose from: "int8"'),
        (["--resume"], "give --checkpoint-every as well"),
        (["--checkpoint-every", "0"], "must be at least 1, got 0"),
        (["--checkpoint-every", "x"], "unable to convert"),
        (["--strength", "0.5"], "give that as video"),
        (["--sampler", "x"], "sampler is 'x'; allowed are"),
        (["--sampler-options", "x"], "--sampler-options"),
        (["--output-type", "latent"], "an mp4 is made of np or uint8 frames"),
        (["--prompt", "0: a", "--prompt", "b"], "'b' has no time"),
        (["a fox"], "Unused Tokens"),
    ],
)
def test_what_is_refused_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        parse_flags(words)
    assert "\n" not in str(caught.value)


def test_files_that_are_read_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"prompt_changes: {tmp_path / 'b.json'}\n")
    (tmp_path / "b.json").write_text('{"5s": "it snows"}')
    arguments = parse("--config", str(tmp_path / "a.yaml"), "--image", "c.png", "--prompts", "p.txt")
    assert arguments.inputs == (tmp_path / "a.yaml", tmp_path / "b.json", Path("c.png"), Path("p.txt"))
    both = parse("--prompt", "0: a", "--prompt", "9: b", "--prompt-changes", str(tmp_path / "b.json"))
    assert both.config.prompt_changes == {"9": "b", "5s": "it snows"}
