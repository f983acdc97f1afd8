"""Two runs of `wan-ar generate` never write the same video at once."""

import os
import signal
from pathlib import Path

import pytest
from saved_runs import assert_refused, assert_same_video, contents, slowly, start, wait_until, words

from wan_autoregressive.scripts import cli
from wan_autoregressive.scripts.output_files import OutputFiles
from wan_autoregressive.scripts.output_lock import hold_output


def test_a_second_run_is_refused_while_the_first_is_at_it(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    output = tmp_path / "x.mp4"
    first = start(words(tiny_checkpoint, output), before=slowly)
    assert wait_until(lambda: (OutputFiles(output).resume_folder / "state.json").exists(), first)
    capfd.readouterr()
    for more in ([], ["--resume"], ["--seed", "4", "--resume"]):
        assert_refused(cli.main(words(tiny_checkpoint, output, *more)), capfd, f"another run is writing '{output}'")
    first.join()
    assert first.exitcode == 0
    assert sorted(contents(tmp_path)) == ["x.json", "x.mp4"]


@pytest.mark.slow
def test_a_run_that_was_killed_holds_nothing(tiny_checkpoint: Path, uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.mp4"
    first = start(words(tiny_checkpoint, output), before=slowly)
    assert wait_until(lambda: (OutputFiles(output).resume_folder / "state.json").exists(), first)
    os.kill(first.pid or 0, signal.SIGKILL)
    first.join()
    assert cli.main(words(tiny_checkpoint, output, "--resume")) == 0
    assert_same_video(output, uninterrupted, exact=True)
    assert sorted(contents(tmp_path)) == ["x.json", "x.mp4"]


def test_a_list_leaves_out_the_one_that_another_run_makes(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "videos"
    prompts.write_text("a red fox\nrain\n")
    folder.mkdir()
    more = ["--prompts", str(prompts), "--output", str(folder), "--height", "32", "--width", "48"]
    with hold_output(folder / "0001.mp4"):
        assert cli.main(["generate", "--model", str(tiny_checkpoint), *more, "--num-frames", "5"]) != 0
        assert "0001.mp4: another run is writing" in capfd.readouterr().err
        assert sorted(path.name for path in folder.glob("*.mp4")) == ["0002.mp4"]
    assert sorted(contents(folder)) == ["0002.json", "0002.mp4"]


def test_a_dry_run_holds_nothing_and_asks_nobody(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with hold_output(tmp_path / "x.mp4"):
        assert cli.main(words(tiny_checkpoint, tmp_path / "x.mp4", "--dry-run")) == 0


def test_it_ends_with_the_block_also_where_that_fails(tmp_path: Path) -> None:
    output = tmp_path / "x.mp4"

    def fail() -> None:
        with hold_output(output):
            with pytest.raises(ValueError, match="another run"), hold_output(output):
                pass
            assert list(tmp_path.iterdir())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    with hold_output(output):
        pass
