"""What outlives a crash, a full disk and another model; and how a video is mended of which a part is lost."""

import errno
import shutil
import signal
from pathlib import Path

import pytest
import torch
from live_server import ServerProcess
from live_viewer import GREEN, RED, Viewer, alone, live_model, new_engine, until
from live_web import WebViewer

from wan_autoregressive.server.live_video import LiveVideo
from wan_autoregressive.server.messages import Fork, Pause


def test_after_a_crash_a_video_goes_on_from_its_checkpoint_to_the_bit(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", checkpoint_every=2)
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    viewer.watch(5)
    engine.command(viewer.session, Pause())
    until(lambda: not viewer.session.encoding)
    shutil.copytree(tmp_path / "state", tmp_path / "killed")  # as a kill would leave it
    made = len(viewer.session.video.timeline.chunks)
    engine.shutdown()

    never_saved, foreign = tmp_path / "killed" / ("A" * 22), tmp_path / "killed" / ("B" * 22)
    shutil.copytree(tmp_path / "killed" / viewer.session.id / "chunks", never_saved / "chunks")
    foreign.mkdir()
    engine = new_engine(pipe, tmp_path / "killed")
    assert (never_saved.exists(), foreign.exists()) == (False, True)
    again = Viewer(engine, resume=viewer.session.id, ahead=1)
    saved = again.wait_for("started").num_chunks
    assert saved in (4, 5)
    assert again.watch(3) == alone(pipe, RED, 9, saved + 3)[saved:]
    assert min(again.chunks) >= made  # a number that somebody may hold is not used again
    kept = sorted(int(path.stem) for path in (tmp_path / "killed" / again.session.id / "chunks").glob("*.mp4"))
    assert kept == sorted(again.session.video.timeline.chunks)
    engine.shutdown()


@pytest.mark.slow
def test_chunks_that_are_lost_are_left_out_with_what_follows_them(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state")
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    viewer.watch(4)
    engine.command(viewer.session, Fork(chunk=1, prompt=GREEN))
    until(lambda: viewer.wait_for("chunk").parent == 1)
    engine.shutdown()
    folder = tmp_path / "state" / viewer.session.id
    (folder / "chunks" / "2.mp4").unlink()

    video = LiveVideo.load(live_model(pipe), folder)
    assert {0, 1} <= set(video.timeline.chunks)
    assert not {2, 3} & set(video.timeline.chunks)
    assert video.timeline.tips[0] == 1
    video.fork(1)
    while (made := video.advance()) is None:
        pass
    plain = live_model(pipe).start(RED, 9)
    assert (made.frames == [plain.step() for _ in range(3)][-1].frames[0]).all()


@pytest.mark.slow
def test_a_full_disk_ends_one_video_in_words(pipe, tmp_path, monkeypatch):
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    bad, good = Viewer(engine, prompt=RED, seed=1, ahead=1), Viewer(engine, prompt=GREEN, seed=2, ahead=1)
    bad.watch(1), good.watch(1)
    write, folder = Path.write_bytes, bad.session.video.folder.path

    def full(self, data):
        if self.is_relative_to(folder):
            write(self, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    bad.play(0)
    error = bad.wait_for("error")
    assert (error.code, "No space left on device" in error.message) == ("failed", True)
    assert len(good.watch(3)) == 3
    until(lambda: engine.figures()["parked"] == 1)
    monkeypatch.undo()

    # Once there is room, it goes on where it can be shown to.
    again = Viewer(engine, resume=bad.session.id, ahead=1)
    again.wait_for("chunk")
    made, body = again.chunks[max(again.chunks)]
    assert body == alone(pipe, RED, 1, made.index + 1)[-1]
    assert [part.index for part in again.session.video.timeline.branch_path()][: made.index] == list(range(made.index))
    engine.shutdown()


def test_a_video_that_cannot_be_saved_goes_on(pipe, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("wan_autoregressive.server.video_folder.VideoFolder.save_rollout", full)
    engine = new_engine(pipe, tmp_path / "state", checkpoint_every=1)
    viewer = Viewer(engine, prompt=RED, seed=1, ahead=1)
    watched = viewer.watch(1)
    viewer.play(0)
    assert viewer.wait_for("error").code == "not_saved"
    assert [*watched, *viewer.watch(2)][:2] == alone(pipe, RED, 1, 2)
    engine.shutdown()


def test_no_room_for_a_new_video(pipe, tmp_path, monkeypatch):
    engine = new_engine(pipe, tmp_path / "state")

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("wan_autoregressive.server.video_folder.VideoFolder.make", full)
        with pytest.raises(OSError, match="No space left"):
            Viewer(engine, prompt=RED)
    assert engine.figures()["active"] == 0
    Viewer(engine, prompt=RED).watch(1)
    engine.shutdown()


@pytest.mark.slow
def test_a_video_of_another_model_is_refused_and_kept(pipe, other_pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state")
    viewer = Viewer(engine, prompt=RED, seed=1, ahead=1)
    viewer.watch(2)
    engine.shutdown()
    with torch.no_grad():
        other_pipe.transformer.patch_embedding.weight.mul_(2)
    other = new_engine(other_pipe, tmp_path / "state", slots=2)
    with pytest.raises(ValueError, match=r"this video was made by another model; it can be watched .+ other weights"):
        Viewer(other, resume=viewer.session.id)
    Viewer(other, prompt=RED).watch(1)
    other.shutdown()
    engine = new_engine(pipe, tmp_path / "state")
    again = Viewer(engine, resume=viewer.session.id, ahead=1)
    again.wait_for("chunk")
    made, body = again.chunks[max(again.chunks)]
    assert body == alone(pipe, RED, 1, made.index + 1)[-1]
    engine.shutdown()


@pytest.mark.slow
def test_after_kill_9_the_command_goes_on_to_the_bit(tmp_path):
    words = ("--state", str(tmp_path / "state"), "--checkpoint-every", "2")
    prompt = "a red circle moving right on a navy background"
    server = ServerProcess(*words, log=tmp_path / "first.log")
    viewer = WebViewer(server.port, prompt=prompt, seed=9, ahead=1)
    session = viewer.wait_for("started")["session"]
    whole = viewer.watch(8)
    server.process.send_signal(signal.SIGKILL)
    server.stop()
    again = ServerProcess(*words, log=tmp_path / "second.log")
    viewer = WebViewer(again.port, resume=session, ahead=1)
    saved = viewer.wait_for("started")["num_chunks"]
    assert 6 <= saved <= 8
    rest = viewer.watch(2)
    assert rest[: 8 - saved] == whole[saved : saved + 2]
    assert viewer.chunks[min(viewer.chunks)]["index"] == saved
    viewer.close()
    again.stop()
