"""What can be taken home of a live video over HTTP, and how its frames come where there is no H.264."""

import io
import json
import struct

import numpy as np
import pytest
import yaml
from live_viewer import GREEN, RED, Viewer, live_model, new_engine
from PIL import Image
from saved_runs import frames_of
from starlette.testclient import TestClient

from wan_autoregressive.server.app import build_app
from wan_autoregressive.server.chunk_files import encode_images
from wan_autoregressive.server.guard import Door
from wan_autoregressive.server.messages import ChangePrompt, ChangeSettings, Fork, LiveSettings, unpack

LOCAL, LIVE = "http://127.0.0.1:8000", "ws://127.0.0.1:8000/v1/live"


@pytest.fixture
def client(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    with TestClient(build_app(engine, Door()), base_url=LOCAL) as client:
        client.engine = engine
        yield client


def images(body: bytes) -> np.ndarray:
    frames = []
    while body:
        (length,) = struct.unpack_from(">I", body)
        frames.append(np.asarray(Image.open(io.BytesIO(body[4 : 4 + length])).convert("RGB")))
        body = body[4 + length :]
    return np.stack(frames)


def test_images_are_the_frames_to_the_bit(client, pipe):
    viewer = Viewer(client.engine, prompt=RED, seed=3, transport="images")
    watched = [images(body) for body in viewer.watch(2)]
    rollout = live_model(pipe).start(RED, 3)
    np.testing.assert_array_equal(np.concatenate(watched), np.concatenate([rollout.step().frames[0] for _ in "ab"]))
    address = f"/v1/sessions/{viewer.session.id}/chunks"
    np.testing.assert_array_equal(images(client.get(f"{address}/1.images").content), watched[1])
    assert client.get(f"{address}/1.mp4").content[4:8] == b"ftyp"

    # A chunk that was made for another browser is near to what it was.
    other = Viewer(client.engine, prompt=RED, seed=3)
    other.watch(1)
    near = images(client.get(f"/v1/sessions/{other.session.id}/chunks/0.images").content)
    assert near.shape == watched[0].shape
    assert np.abs(near.astype(int) - watched[0]).mean() < 6
    assert client.get(f"{address}/99.images").status_code == 404


def test_large_frames_become_jpegs():
    frames = np.full((2, 270, 480, 3), 90, np.uint8)
    body = encode_images(frames)
    assert body[4:6] == b"\xff\xd8"
    assert np.abs(images(body).astype(int) - frames).max() <= 2


def test_a_branch_with_how_it_was_made(client, tmp_path):
    viewer = Viewer(client.engine, prompt=RED, seed=3, settings=LiveSettings(window_frames=9))
    viewer.watch(2)
    client.engine.command(viewer.session, Fork(chunk=0, prompt=GREEN))
    while viewer.wait_for("chunk").branch == 0:  # one may have been on its way
        pass
    address = f"/v1/sessions/{viewer.session.id}"
    making = client.get(f"{address}/video.json?branch=1").json()
    assert [chunk["prompt"] for chunk in making["chunks"]][:2] == [RED, GREEN]
    assert (making["seed"], making["settings"]["window_frames"]) == (3, 9)
    (tmp_path / "video.mp4").write_bytes(client.get(f"{address}/video.mp4?branch=1").content)
    assert len(frames_of(tmp_path / "video.mp4")) in (21, 33)  # the newest may still be on its way
    assert making["frames"] == 9 + 12 * (len(making["chunks"]) - 1)

    answer = client.get(f"{address}/schedule.yaml?branch=1")
    assert 'filename="video.yaml"' in answer.headers["content-disposition"]
    plan = yaml.safe_load(answer.text)
    assert (plan["prompt"], plan["seed"], plan["window_frames"]) == (RED, 3, 9)
    assert plan["prompt_changes"] == {"3": GREEN}
    read = client.post("/v1/schedules", content=answer.content).json()
    assert (read["prompt"], read["prompt_changes"], read["settings"]["window_frames"]) == (RED, {"3": GREEN}, 9)

    for wrong in ("video.json?branch=7", "schedule.yaml?branch=x", "schedule.yaml?branch=9999999999", "image.png"):
        assert client.get(f"{address}/{wrong}").status_code == 404
    for name in ("video.json", "schedule.yaml", "image.png", "chunks/0.images"):
        assert client.get(f"/v1/sessions/{'x' * 22}/{name}").status_code == 404
    client.engine.command(viewer.session, ChangeSettings(settings=LiveSettings(switch_policy="flush")))
    viewer.wait_for("chunk")
    viewer.play(max(viewer.chunks))
    viewer.watch(2)
    refused = client.get(f"{address}/schedule.yaml")
    assert refused.status_code == 409
    assert "settings changed at" in refused.json()["error"]["message"]


def test_the_picture_that_a_video_starts_from(client):
    picture = Image.new("RGB", (32, 32), "orange")
    viewer = Viewer(client.engine, image=picture, prompt=RED)
    viewer.watch(1)
    address = f"/v1/sessions/{viewer.session.id}"
    found = Image.open(io.BytesIO(client.get(f"{address}/image.png").content))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(picture))
    assert yaml.safe_load(client.get(f"{address}/schedule.yaml").text)["image"] == "image.png"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"\xff\xfe", 400, "utf-8"),
        (b"a: &b [1]\nc: *b", 400, "aliases"),
        (b"prompt: x" + b"y" * 70_000, 413, "64 KB"),
        (b"seed: 2", 400, "no prompt"),
    ],
)
def test_schedules_that_are_refused(client, body, status, message):
    answer = client.post("/v1/schedules", content=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_settings_over_the_socket(client):
    with client.websocket_connect(LIVE) as socket:

        def wait_for(kind: str) -> dict:
            while True:
                message = socket.receive()
                body = message.get("bytes")
                header = json.loads(message["text"]) if body is None else unpack(body)[0]
                if header["type"] == kind:
                    return header

        socket.send_json({"type": "start", "prompt": RED, "settings": {"num_inference_steps": 2}, "ahead": 1})
        wait_for("chunk")
        # What cannot change is said in words, and the video goes on.
        socket.send_json({"type": "settings", "settings": {"window_frames": 9}})
        assert "window_frames cannot change" in wait_for("error")["message"]
        socket.send_json({"type": "settings", "settings": {"switch_policy": "flush"}})
        socket.send_json({"type": "played", "chunk": 0})
        wait_for("chunk")
        socket.send_bytes(b"a frame of a camera that nobody asked for")
        assert "camera: true" in wait_for("error")["message"]
    names = {setting["name"]: setting for setting in client.get("/v1/model").json()["settings"]}
    assert names["switch_policy"]["changeable"]
    assert not names["window_frames"]["changeable"]
    assert "memory_bank" not in names["sampler"]["choices"]
    assert all(setting["meaning"] for setting in names.values())


def test_a_prompt_by_hand_comes_before_what_was_planned(client):
    viewer = Viewer(client.engine, prompt=RED, prompt_changes={"3": GREEN, "6": "rain"}, ahead=1)
    viewer.watch(1)
    viewer.wait_for("chunk")
    client.engine.command(viewer.session, ChangePrompt(prompt="fog"))
    viewer.wait_for("cut")
    viewer.play(1)
    viewer.watch(2)
    assert [message.prompt for message, _ in viewer.chunks.values()] == [RED, GREEN, "fog", "fog"]
