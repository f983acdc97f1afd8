"""`wan-ar generate` around the model: a pipeline that paints numbers stands in for it."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from wan_autoregressive.media.video_writer import VideoWriteError, VideoWriter
from wan_autoregressive.scripts import cli, generate


@dataclass
class FakeEstimate:
    chunks: int
    kv_cache_bytes: int = 3 * 2**20


class FakeTokenizer:
    """A token per word, and one for the end; `griffin` is not in its vocabulary."""

    unk_token_id = 2

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [*(2 if word == "griffin" else 9 for word in text.split()), 1]}


class FakePipeline:
    """Paints the seed's first random number into every frame, 9 frames first and 12 per later chunk."""

    device = torch.device("cpu")
    transformer = SimpleNamespace(dtype=torch.float32)
    tokenizer = FakeTokenizer()
    scheduler = SimpleNamespace(config=SimpleNamespace(denoising_steps=[1000, 500], shift=5, warp=True))
    vae_scale_factor_temporal = 4

    def __init__(self, fail: Callable[[str, int], None] | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.estimates: list[dict[str, Any]] = []
        self.fail = fail

    def wan_components(self) -> Any:
        return SimpleNamespace(condition_channels=0)

    def estimate(self, **options: Any) -> FakeEstimate:
        self.estimates.append(options)
        return FakeEstimate(chunks=-(-(options["num_frames"] - 9) // 12) + 1)

    def stream(self, prompt: str, **options: Any) -> Iterator[Any]:
        self.calls.append({"prompt": prompt, **options})
        level = float(torch.rand((), generator=options["generator"]))
        done, index = 0, 0
        while done < options["num_frames"]:
            if self.fail is not None:
                self.fail(prompt, index)
            count = min(12 if done else 9, options["num_frames"] - done)
            frames = np.full((1, count, options["height"], options["width"], 3), level, np.float32)
            timings = SimpleNamespace(text_s=0.5, denoise_s=2.0, clean_pass_s=1.0, decode_s=0.25, encode_s=0.125)
            yield SimpleNamespace(frames=frames, timings=timings, index=index)
            done, index = done + count, index + 1


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setattr(generate, "load_pipeline", lambda config: fake)
    monkeypatch.setattr(generate, "check_model_folder", lambda folder: None)
    return fake


def arguments(output: Path, *more: str) -> list[str]:
    return ["generate", "--model", "m", "--height", "32", "--width", "48", "--output", str(output), *more]


def test_a_prompt_becomes_an_mp4_and_a_report(tmp_path: Path, pipe: FakePipeline, capsys) -> None:
    target = tmp_path / "x.mp4"
    assert cli.main(arguments(target, "--prompt", "a fox", "--num-frames", "25", "--seed", "7", "--fps", "8")) == 0
    video = iio.imread(target, plugin="FFMPEG")
    assert video.shape == (25, 32, 48, 3)
    level = 255 * float(torch.rand((), generator=torch.Generator().manual_seed(7)))
    assert abs(float(video.mean()) - level) < 3
    assert iio.immeta(target, plugin="FFMPEG")["fps"] == 8

    report = json.loads((tmp_path / "x.json").read_text())
    assert report["seed"] == report["config"]["seed"] == 7
    assert report["config"]["prompt"] == "a fox"
    assert report["config"]["denoising_steps"] == [1000, 500]  # the model's own
    assert (report["chunks"], report["frames"]) == (3, 25)
    seconds = report["seconds"]
    assert seconds.keys() == {"load", "text", "given", "denoise", "clean_pass", "decode", "encode"}
    assert (seconds["text"], seconds["denoise"], seconds["clean_pass"], seconds["decode"]) == (1.5, 6, 3, 0.75)
    assert seconds["given"] == 0.375
    assert seconds["encode"] > 0
    assert 0 < report["first_frame_latency_s"] <= report["seconds_total_without_load"]
    assert report["versions"].keys() == {"python", "wan-autoregressive", "torch", "diffusers", "transformers"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.mp4"]

    out, err = capsys.readouterr()
    assert "25 frames of 48x32" in out
    assert "seed 7" in out
    assert err == ""


def test_settings_reach_the_pipeline(tmp_path: Path, pipe: FakePipeline) -> None:
    more = ["--prompt", "a", "--negative-prompt", "b", "--config", "longlive", "--num-frames", "9", "--sink-frames=1"]
    assert cli.main(arguments(tmp_path / "x.mp4", *more, "--guidance-scale", "2", "--context-noise", "3")) == 0
    call = pipe.calls[0]
    assert (call["window_frames"], call["sink_frames"], call["chunk_frames"], call["num_frames"]) == (12, 1, 3, 9)
    assert (call["negative_prompt"], call["guidance_scale"], call["context_noise"]) == ("b", 2, 3)
    assert (call["height"], call["width"], call["video"], call["output_type"]) == (32, 48, None, "uint8")
    assert (call["max_sequence_length"], call["first_chunk_frames"]) == (512, None)


def test_a_seed_is_drawn_and_noted_and_gives_the_same_again(tmp_path: Path, pipe: FakePipeline) -> None:
    first, again = tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert cli.main(arguments(first, "--prompt", "a", "--num-frames", "5")) == 0
    seed = json.loads((tmp_path / "a.json").read_text())["seed"]
    assert cli.main(arguments(again, "--prompt", "a", "--num-frames", "5", "--seed", str(seed))) == 0
    assert first.read_bytes() == again.read_bytes()


def test_given_frames_reach_the_pipeline(tmp_path: Path, pipe: FakePipeline) -> None:
    Image.new("RGB", (96, 64), (10, 20, 30)).save(tmp_path / "a.png")
    assert cli.main(arguments(tmp_path / "x.mp4", "--prompt", "a", "--image", str(tmp_path / "a.png"))) == 0
    assert pipe.calls[0]["image"].shape == (32, 48, 3)
    assert (pipe.calls[0]["image"] == (10, 20, 30)).all()
    assert pipe.estimates[0]["given_frames"] == 1
    with VideoWriter(tmp_path / "clip.mp4", fps=16) as writer:
        writer.write(np.zeros((9, 64, 96, 3), np.uint8))
    assert cli.main(arguments(tmp_path / "x.mp4", "--prompt", "a", "--video", str(tmp_path / "clip.mp4"))) == 0
    assert pipe.calls[1]["video"].shape == (1, 9, 32, 48, 3)
    assert pipe.estimates[1]["given_frames"] == 3


def test_a_clip_with_a_strength_is_the_source(tmp_path: Path, pipe: FakePipeline) -> None:
    with VideoWriter(tmp_path / "clip.mp4", fps=16) as writer:
        writer.write(np.zeros((12, 64, 96, 3), np.uint8))
    more = ["--prompt", "a", "--video", str(tmp_path / "clip.mp4"), "--strength", "0.5", "--num-frames", "9"]
    for length, frames in ((9, 9), (20, 9)):  # at most the source's 1 + 4 n frames
        assert cli.main(arguments(tmp_path / "x.mp4", *more, "--num-frames", str(length))) == 0
        assert pipe.estimates[-1]["num_frames"] == frames
        assert "given_frames" not in pipe.estimates[-1]
        assert pipe.calls[-1]["video"].shape[1:] == (32, 48, 3)  # frame by frame, not a batch
        assert pipe.calls[-1]["strength"] == 0.5


def test_words_outside_of_the_vocabulary_are_named_and_rendered(tmp_path: Path, pipe: FakePipeline, capsys) -> None:
    more = ["--prompt", "0: a griffin and a fox", "--prompt", "5: a griffin", "--num-frames", "5"]
    assert cli.main(arguments(tmp_path / "x.mp4", *more)) == 0
    assert capsys.readouterr().err == (
        "wan-ar: warning: the vocabulary of the model has no 'griffin'; it reads every such word as unknown\n"
    )


def test_a_dry_run_needs_no_output(tmp_path: Path, pipe: FakePipeline, capsys) -> None:
    assert cli.main(["generate", "--model", "m", "--prompt", "a", "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["config"]["output"] is None
    assert cli.main(["generate", "--model", "m", "--prompt", "a"]) == 2
    assert "output is missing; give --output" in capsys.readouterr().err


def test_a_dry_run_prints_yaml_and_writes_nothing(tmp_path: Path, pipe: FakePipeline, capsys) -> None:
    assert cli.main(arguments(tmp_path / "x.mp4", "--prompt", "a ü", "--dry-run", "--seed", "1")) == 0
    out = capsys.readouterr().out
    shown = yaml.safe_load(out)
    assert shown["config"]["prompt"] == "a ü"
    assert shown["each_video"] == {"chunks": 7, "kv_cache_bytes": 3145728}
    assert "# 3 MiB" in out
    assert shown["videos"] == 1
    assert list(tmp_path.iterdir()) == []
    assert pipe.calls == []


def test_a_prompts_file_makes_numbered_videos_and_goes_on_after_a_failure(
    tmp_path: Path, pipe: FakePipeline, capsys
) -> None:
    def fail(prompt: str, index: int) -> None:
        if prompt == "bad" and index == 1:
            raise RuntimeError("the card\ncaught fire")

    pipe.fail = fail
    (tmp_path / "p.txt").write_text("one\n\nbad\n  three  \n" + "far too long " * 300 + "\n")
    more = ["--prompts", str(tmp_path / "p.txt"), "--num-frames", "21", "--seed", "1"]
    assert cli.main(arguments(tmp_path / "out", *more)) == 1
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["0001.json", "0001.mp4", "0002.part.mp4", "0003.json", "0003.mp4"]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3
    assert err[0].startswith("wan-ar: error: 0002.mp4: the card caught fire; 9 of 9 frames are kept in")
    assert err[1].startswith("wan-ar: error: 0004.mp4: prompt is too long: 901 tokens")
    assert err[2] == "wan-ar: error: 2 of 4 videos failed: 0002.mp4, 0004.mp4"
    report = json.loads((tmp_path / "out" / "0003.json").read_text())
    assert report["config"]["prompt"] == "three"
    assert report["config"]["prompts"] is None
    assert report["config"]["output"].endswith("0003.mp4")


def test_an_older_video_survives_a_failure(tmp_path: Path, pipe: FakePipeline, capsys) -> None:
    (tmp_path / "x.mp4").write_bytes(b"older")

    def fail(prompt: str, index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    pipe.fail = fail
    assert cli.main(arguments(tmp_path / "x.mp4", "--prompt", "a", "--num-frames", "21")) == 130
    assert (tmp_path / "x.mp4").read_bytes() == b"older"
    part = tmp_path / "x.part.mp4"
    assert capsys.readouterr().err == f"wan-ar: error: interrupted; 9 of 9 frames are kept in '{part}'\n"
    assert len(iio.imread(part, plugin="FFMPEG")) == 9


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "got neither"),
        (["--prompt", "a", "--height", "33"], "multiple of 16"),
        (["--prompt", "a", "--num-frame", "5"], "Did you mean --num-frames?"),
        (["--prompt", "a", "--image", "{tmp}/none.png"], "does not exist"),
        (["--prompt", "a", "--image", "{tmp}/text.txt"], "as an image"),
        (["--prompt", "a", "--video", "{tmp}/text.txt"], "as a video"),
        (["--prompt", "a", "--output", "{tmp}/text.txt/x.mp4"], "is not a folder"),
        (["--prompt", "a", "--output", "{tmp}/none/x.mp4"], "does not exist"),
        (["--prompt", "a", "--output", "{tmp}/x.avi"], "ends in .mp4"),
        (["--prompts", "{tmp}/none.txt"], "cannot read the prompts file"),
        (["--prompts", "{tmp}/empty.txt", "--output", "{tmp}/out"], "holds no prompt"),
        (["--prompts", "{tmp}/text.txt", "--output", "{tmp}/text.txt"], "is not a folder"),
        (["--prompt", "word " * 600], "prompt is too long: 601 tokens, and max_sequence_length is 512"),
        (["--prompt", "a", "--config", "{tmp}/bad.yaml"], "unknown key 'hieght'; did you mean 'height'"),
        (["--prompt", "a", "--prompt-changes", "{tmp}/y.json", "--output", "{tmp}/y.mp4"], "written over the input"),
        (["--prompts", "{tmp}/text.txt", "--image", "{tmp}/out/0001.json", "--output", "{tmp}/out"], "over the input"),
        (["--prompt", "a", "--output", "{tmp}/other.mp4"], "is no report of this command"),
        (["--prompt", "a", "--video", "{tmp}/text.txt", "--strength", "1", "--checkpoint-every", "1"], "half way"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_nothing_written(
    tmp_path: Path, pipe: FakePipeline, capsys, more: list[str], message: str
) -> None:
    (tmp_path / "text.txt").write_text("hello\n")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "bad.yaml").write_text("hieght: 64\n")
    (tmp_path / "y.json").write_text('{"5s": "it snows"}')
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "out").mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "out" / "0001.json", "PNG")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    code = cli.main(arguments(tmp_path / "x.mp4", *(word.replace("{tmp}", str(tmp_path)) for word in more)))
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("wan-ar: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert pipe.calls == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (VideoWriteError("could not write 'x.mp4': No space left on device"), 2, "could not write 'x.mp4': No space"),
        (OSError(28, "No space left on device", "x.json"), 2, "x.json: No space left on device"),
        (PermissionError(13, "Permission denied", "x.json"), 2, "x.json: Permission denied"),
        (KeyError("lost"), 1, "unexpected KeyError: 'lost' (--debug shows where)"),
        (ValueError("two\nlines"), 2, "two lines"),
        (MemoryError(), 1, "there is not enough memory"),
    ],
)
def test_failures_are_one_line(
    tmp_path: Path, pipe: FakePipeline, capsys, error: Exception, code: int, line: str
) -> None:
    def fail(prompt: str, index: int) -> None:
        raise error

    pipe.fail = fail
    assert cli.main(arguments(tmp_path / "x.mp4", "--prompt", "a")) == code
    err = capsys.readouterr().err
    assert err.startswith(f"wan-ar: error: {line}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path, pipe: FakePipeline, capsys) -> None:
    def fail(prompt: str, index: int) -> None:
        raise ValueError("wrong")

    pipe.fail = fail
    assert cli.main(arguments(tmp_path / "x.mp4", "--prompt", "a", "--debug")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_is_there_without_waiting_for_torch() -> None:
    code = """
        import sys
        from wan_autoregressive.scripts.cli import build_parser
        print(build_parser(["generate"]).format_help())
        sys.exit(bool({"torch", "diffusers", "transformers"} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["--version"], ["convert", "--help"]])
def test_help_and_version_leave_with_0(words: list[str], capsys) -> None:
    assert exit_code_of(words) == 0
    assert "wan-ar" in capsys.readouterr().out


def exit_code_of(words: list[str]) -> Any:
    """argparse leaves by SystemExit."""
    try:
        return cli.main(words)
    except SystemExit as leave:
        return leave.code


@pytest.mark.parametrize("words", [[], ["render"], ["--verbose"], ["generate", "x", "--model"]])
def test_a_wrong_command_is_one_line(words: list[str], capsys) -> None:
    assert exit_code_of(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
