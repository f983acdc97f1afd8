"""Settings of a run: what is refused and how it is said, presets, and which layer wins."""

from pathlib import Path

import pytest
import yaml

from wan_autoregressive.configs import load_preset, preset_names, resolve_config

BASE = {"model": "m", "prompt": "a fox", "output": "x.mp4"}


def test_defaults_are_valid_and_frozen() -> None:
    config = resolve_config(BASE)
    assert (config.rollout.height, config.rollout.width, config.rollout.num_frames) == (480, 832, 81)
    with pytest.raises(ValueError, match="frozen"):
        config.fps = 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "height is 0; it must be"),
        ({"width": -16}, "width is -16; it must be"),
        ({"height": 100}, "height must be a multiple of 16 pixels, got 100; the nearest: 96 and 112"),
        ({"num_frames": 0}, "num_frames is 0; it must be"),
        ({"num_frames": "many"}, "num_frames: must be a valid integer"),
        ({"chunk_frames": -3}, "chunk_frames is -3; it must be"),
        ({"window_frames": 0}, "window_frames is 0; it must be"),
        ({"window_frames": 2}, "window_frames is 2, which does not hold a sink of 0 and a chunk of 3 latent frames"),
        ({"window_frames": 4, "first_chunk_frames": 5}, "a chunk of 5 latent frames; it must be at least 5"),
        ({"sink_frames": 1}, "window_frames is not set"),
        ({"window_frames": 5, "sink_frames": 3}, "it must be at least 6"),
        ({"fps": float("nan")}, "fps: must be a finite number"),
        ({"fps": 0}, "fps: must be greater than 0, got 0"),
        ({"prompt": "  "}, "prompt: it is empty"),
        ({"prompt": "\ud800"}, "prompt: it is not valid text"),
        ({"prompts": "p.txt"}, "got both"),
        ({"image": "a.png", "video": "b.mp4"}, "got both image and video"),
        ({"output": "x.avi"}, r"ends in \.mp4, got 'x.avi'"),
        ({"output": ""}, "output: the name is empty"),
        ({"denoising_steps": "0"}, "a count of steps must be between 1 and 1000, got 0"),
        ({"denoising_steps": "250,500"}, "denoising_steps must descend, got 250, 500"),
        ({"denoising_steps": [1001]}, "from 0 to 1000, got 1001"),
        ({"denoising_steps": ""}, "denoising_steps is empty"),
        ({"device": "gpu"}, "device: must be auto, cpu"),
        ({"dtype": "int8"}, "dtype: must be 'auto', 'float32'"),
        ({"kv_dtype": "int4"}, "kv_dtype: must be 'int8'"),
        (
            {
                **{"kv_dtype": "int8", "sink_update": "moving_average", "position_mode": "relative"},
                **{"window_frames": 6, "sink_frames": 1},
            },
            "less than the rounding of kv_dtype 'int8'",
        ),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"scale": 64, "width": 832}, "more than the 16384 pixels"),
        ({"wdith": 64}, "unknown key 'wdith'; did you mean 'width'?"),
        ({"steps": 4}, "unknown key 'steps'; did you mean 'denoising_steps'?"),
    ],
)
def test_bad_values_are_one_line_that_names_the_key(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve_config(BASE | change)
    assert "\n" not in str(caught.value)


def test_all_problems_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"fps: must be .*; unknown key 'wdith'"):
        resolve_config(BASE | {"fps": "x", "wdith": 3})


@pytest.mark.parametrize(
    ("given", "expected"),
    [("4", (1000, 750, 500, 250)), (3, (1000, 667, 333)), ("1000, 757,522", (1000, 757, 522)), ([937.5], (937.5,))],
)
def test_steps_are_a_count_or_a_list(given: object, expected: tuple) -> None:
    assert resolve_config(BASE, {"denoising_steps": given}).rollout.denoising_steps == expected


def test_later_layers_win_key_by_key() -> None:
    config = resolve_config(BASE, {"height": 64, "width": 96}, {"width": "128"})
    assert (config.rollout.height, config.rollout.width, config.rollout.num_frames) == (64, 128, 81)


def test_a_later_layer_replaces_what_excludes_it() -> None:
    assert resolve_config(BASE, {"prompts": "p.txt", "output": "folder"}).prompt is None
    assert resolve_config(BASE, {"image": "a.png"}, {"video": "b.mp4"}).image is None


def test_every_preset_is_a_recipe_and_nothing_else() -> None:
    assert preset_names() == [
        "causal_forcing_1step",
        "causal_forcing_2step",
        "causal_forcing_framewise",
        "causal_forcing_long",
        "causvid",
        "demo",
        "fastvideo_a14b",
        "infinity_rope",
        "krea_14b",
        "longlive",
        "longlive2",
        "longlive2_2step",
        "longlive2_i2v",
        "memflow",
        "reward_forcing",
        "rolling_forcing",
        "self_forcing",
        "streamdiffusion_v2",
    ]
    for name in preset_names():
        preset = load_preset(name)
        assert not preset.keys() & {"model", "prompt", "prompts", "output", "seed", "image", "video", "device"}
        resolve_config(BASE, preset)


def test_presets_hold_the_published_numbers() -> None:
    longlive = resolve_config(BASE, load_preset("longlive"))
    assert (longlive.rollout.window_frames, longlive.rollout.sink_frames, longlive.rollout.chunk_frames) == (12, 3, 3)
    causvid = resolve_config(BASE, load_preset("causvid"))
    assert (causvid.rollout.denoising_steps, causvid.shift, causvid.warp) == ((1000, 757, 522), 8, False)
    self_forcing = resolve_config(BASE, load_preset("self_forcing"))
    assert (self_forcing.rollout.denoising_steps, self_forcing.shift, self_forcing.warp) == (
        (1000, 750, 500, 250),
        5,
        True,
    )
    assert (self_forcing.rollout.window_frames, self_forcing.rollout.num_frames) == (None, 81)
    assert load_preset("causal_forcing_framewise")["chunk_frames"] == 1


def test_a_resolved_config_written_to_yaml_resolves_to_itself(tmp_path: Path) -> None:
    config = resolve_config(BASE, load_preset("longlive"), {"seed": 1})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert resolve_config(load_preset(str(tmp_path / "c.yaml"))) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"wdith: 3\n", "unknown key 'wdith'; did you mean 'width'"),
        (b"3: 3\n", "unknown key '3'"),
        (b"- a\n", "got a list"),
        (b"a: [\n", "not valid yaml"),
        (b"seed: 2020-99-99\n", "not valid yaml"),
        (b"\xff\xfe\x00", "cannot read the config file|not valid yaml"),
        (b"[" * 2000, "not valid yaml"),
        (b"prompt: \x07\n", "not valid yaml"),
        (b"!!python/object/apply:os.system ['true']\n", "not valid yaml"),
    ],
)
def test_a_bad_yaml_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_preset(str(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("# nothing\n")
    assert load_preset(str(tmp_path / "c.yml")) == {}


def test_unknown_presets_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'longlve'; did you mean 'longlive'\?"):
        load_preset("longlve")
    with pytest.raises(ValueError, match="No such file"):
        load_preset(str(tmp_path / "missing.yaml"))
