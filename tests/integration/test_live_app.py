"""The live server's doors and messages, through the real routes."""

import io
import json
import struct
import zlib

import pytest
from live_viewer import GREEN, RED, SETTINGS, new_engine, until
from PIL import Image
from saved_runs import frames_of
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from wan_autoregressive.server.app import build_app
from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.guard import Door
from wan_autoregressive.server.limits import EngineLimits
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.messages import unpack

LOCAL, LIVE = "http://127.0.0.1:8000", "ws://127.0.0.1:8000/v1/live"


@pytest.fixture
def client(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=2, queue=0)
    with TestClient(build_app(engine, Door(), idle_s=30), base_url=LOCAL) as client:
        client.engine = engine
        yield client


class Viewer:
    def __init__(self, socket) -> None:
        self.socket, self.bodies = socket, {}

    def say(self, **message) -> None:
        self.socket.send_text(json.dumps(message))

    def wait_for(self, kind: str) -> dict:
        while True:
            message = self.socket.receive()
            if message["type"] == "websocket.close":
                raise WebSocketDisconnect(message["code"])
            if message.get("bytes") is not None:
                header, body = unpack(message["bytes"])
                self.bodies[header["chunk"]] = body
            else:
                header = json.loads(message["text"])
            if header["type"] == kind:
                return header


def test_a_video_from_start_to_download(client, tmp_path):
    with client.websocket_connect(LIVE) as socket:
        viewer = Viewer(socket)
        hello = viewer.wait_for("hello")
        assert (hello["protocol"], hello["fps"], hello["width"], hello["height"]) == (1, 16.0, 256, 256)
        viewer.say(type="start", prompt=RED, seed=3, ahead=1)
        session = viewer.wait_for("started")["session"]
        chunk = viewer.wait_for("chunk")
        assert (chunk["index"], chunk["start_frame"], chunk["prompt"], chunk["parent"]) == (0, 0, RED, None)
        assert chunk["codec"].startswith("avc1.6400")
        viewer.say(type="prompt", prompt=GREEN)
        assert viewer.wait_for("cut")["after"] == 0
        viewer.say(type="played", chunk=0)
        assert viewer.wait_for("chunk")["prompt"] == GREEN
        viewer.say(type="fork", chunk=0, prompt="rain", seed=1)
        viewer.wait_for("cut")
        assert viewer.wait_for("chunk")["branch"] == 1

        described = client.get(f"/v1/sessions/{session}").json()
        assert [entry["prompt"] for entry in described["chunks"]] == [RED, GREEN, "rain"]
        answer = client.get(f"/v1/sessions/{session}/chunks/0.mp4", headers={"Range": "bytes=4-7"})
        assert (answer.status_code, answer.content) == (206, b"ftyp")
        assert client.get(f"/v1/sessions/{session}/chunks/1.mp4").content == viewer.bodies[1]
        assert client.get(f"/v1/sessions/{session}/chunks/0.webp").content[8:12] == b"WEBP"
        joined = {}
        for branch in (0, 1):
            path = tmp_path / f"{branch}.mp4"
            path.write_bytes(client.get(f"/v1/sessions/{session}/video.mp4?branch={branch}").content)
            joined[branch] = frames_of(path)
        parts = {}
        for number, body in viewer.bodies.items():
            (tmp_path / "part.mp4").write_bytes(body)
            parts[number] = frames_of(tmp_path / "part.mp4")
        for branch, second in ((0, 1), (1, 2)):
            expected = [*parts[0], *parts[second]]
            assert len(joined[branch]) == len(expected)
            assert all((one == other).all() for one, other in zip(joined[branch], expected, strict=True))
        assert client.delete(f"/v1/sessions/{session}").status_code == 204
        assert client.get(f"/v1/sessions/{session}").status_code == 404
    metrics = client.get("/metrics").text
    assert "\nwan_ar_steps_total " in metrics
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/v1/model").json()["max_prompt_length"] == 1000


@pytest.mark.parametrize(
    "message",
    [
        *("no json", "[]", "{}", '{"type":"start"}', '{"type":"start","prompt":""}', '{"type":"start","prompt":7}'),
        json.dumps({"type": "start", "prompt": "x" * 1001}),
        *(json.dumps({"type": "start", "prompt": f"a{letter}b"}) for letter in "\0\x1b\x7f\x9b"),
        '{"type":"start","prompt":"\\ud800"}',
        *('{"type":"start","prompt":"x","seed":"1"}', '{"type":"start","prompt":"x","more":1}'),
        *('{"type":"start","resume":"../../etc"}', '{"type":"start","prompt":"x","image":"../x"}'),
        *('{"type":"start","prompt":"x","protocol":2}', '{"type":"played","chunk":0}', '{"type":"prompt"}'),
    ],
)
def test_a_bad_message_ends_only_its_own_connection(client, message):
    with client.websocket_connect(LIVE) as good:
        viewer = Viewer(good)
        viewer.say(type="start", prompt=RED)
        viewer.wait_for("chunk")
        with client.websocket_connect(LIVE) as bad:
            bad.send_text(message)
            assert Viewer(bad).wait_for("error")["code"] == "bad_message"
            with pytest.raises(WebSocketDisconnect) as closed:
                Viewer(bad).wait_for("never")
            assert closed.value.code == 4400
        viewer.say(type="played", chunk=0)
        viewer.wait_for("chunk")


def test_a_prompt_longer_than_the_text_encoder_takes_is_refused_and_nothing_else_happens(pipe, tmp_path):
    model = LiveModel(pipe, {**SETTINGS, "max_sequence_length": 12})
    engine = Engine(model, tmp_path / "state", EngineLimits())
    client = TestClient(build_app(engine, Door()), base_url=LOCAL)
    long = " ".join(["red"] * 12)
    with client, client.websocket_connect(LIVE) as socket:
        assert client.get("/v1/model").json()["max_prompt_tokens"] == 12
        viewer = Viewer(socket)
        viewer.say(type="start", prompt=long)
        error = viewer.wait_for("error")
        assert (error["code"], "make it shorter" in error["message"]) == ("prompt", True)
        viewer.say(type="start", prompt=RED, prompt_changes={"5s": long})
        assert viewer.wait_for("error")["code"] == "prompt"
        viewer.say(type="start", prompt="  a red\n\tcircle ")
        assert viewer.wait_for("chunk")["prompt"] == "a red circle"
        viewer.say(type="prompt", prompt=long)
        assert viewer.wait_for("error")["code"] == "prompt"
        viewer.say(type="prompt", prompt=GREEN)
        viewer.say(type="played", chunk=0)
        assert viewer.wait_for("cut")["prompt"] == GREEN


def test_a_full_queue_says_so(client):
    with client.websocket_connect(LIVE) as one, client.websocket_connect(LIVE) as two:
        for socket in (one, two):
            Viewer(socket).say(type="start", prompt=RED)
            Viewer(socket).wait_for("started")
        with client.websocket_connect(LIVE) as three:
            Viewer(three).say(type="start", prompt=RED)
            assert Viewer(three).wait_for("error")["code"] == "queue_full"
            with pytest.raises(WebSocketDisconnect) as closed:
                Viewer(three).wait_for("never")
            assert closed.value.code == 1013


def test_a_silent_viewer_leaves_the_slot(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state")
    client = TestClient(build_app(engine, Door(), idle_s=0.3), base_url=LOCAL)
    with client, client.websocket_connect(LIVE) as socket:
        Viewer(socket).say(type="start", prompt=RED)
        with pytest.raises(WebSocketDisconnect) as closed:
            Viewer(socket).wait_for("never")
        assert closed.value.code == 4408
        until(lambda: engine.figures()["parked"] == 1)


@pytest.mark.parametrize(
    "headers",
    [
        *({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"}),
        *({"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example:80"}),
    ],
)
def test_foreign_pages_are_turned_away(client, headers):
    assert client.get("/", headers=headers).status_code in (403, 421)
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect(LIVE, headers=headers),
    ):
        pass
    assert closed.value.code == 1008


def test_beyond_loopback_a_token_is_needed(pipe, tmp_path):
    door = Door("0.0.0.0", allow_hosts=("video.example",))
    engine = new_engine(pipe, tmp_path / "state")
    with TestClient(build_app(engine, door), base_url="http://192.168.1.5:8000", follow_redirects=False) as client:
        for path in ("/", "/?token=wrong", "/v1/model", "/metrics", "/page.js"):
            assert client.get(path).status_code == 401, path
        assert client.get("/health").status_code == 200
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("ws://192.168.1.5:8000/v1/live"):
            pass
        assert client.get("/v1/model", headers={"Authorization": f"Bearer {door.token}"}).status_code == 200
        answer = client.get(f"/?token={door.token}")
        cookie = answer.headers["set-cookie"].lower()
        assert answer.status_code == 303
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert client.get("/").status_code == 200  # with the cookie
        assert client.get("/", headers={"Host": "video.example"}).status_code in (200, 401)
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 421


def test_the_page_needs_no_other_host_and_no_inline_code(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for name in ("", "page.css", "page.js", "player.js"):
        text = client.get("/" + name).text
        assert "http://" not in text
        assert "https://" not in text
    assert "<style" not in page.text
    assert "onclick=" not in page.text


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/sessions/..%2f..%2fetc%2fpasswd/video.mp4", "/v1/sessions/../../etc/passwd", "/app.py", "/__init__.py"),
        *("/..%2fapp.py", "/v1/sessions/AAAAAAAAAAAAAAAAAAAAAA/video.mp4", "/.git/config"),
    ],
)
def test_there_are_no_other_files(client, path):
    assert client.get(path).status_code == 404


def png_of_zeros(width: int, height: int) -> bytes:
    """Black, one bit per pixel: a bomb where the size is large."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9), b"\0" * (width // 8 + 1)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", rows) + part(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_pictures_are_looked_at_before_they_are_unpacked(client):
    bomb = png_of_zeros(50_000, 50_000)
    assert len(bomb) < 2**20
    answer = client.post("/v1/images", content=bomb)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_image")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for bad in (
        *(b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"#EXTM3U\nfile:///etc/passwd"),
        png_of_zeros(640, 640)[:60],
        encoded(frames[0], "GIF"),
        *(encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("WEBP", "PNG")),
    ):
        assert client.post("/v1/images", content=bad).status_code == 400, bad[:20]
    assert client.post("/v1/images", content=bytes(9 * 2**20)).status_code == 413
    assert client.post("/v1/images", content=(bytes(2**20) for _ in range(9))).status_code == 413


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "PNG"), ("CMYK", "JPEG"), ("RGBA", "WEBP"), ("I;16", "PNG")])
def test_a_video_starts_from_a_picture(client, mode, kind):
    answer = client.post("/v1/images", content=encoded(Image.new(mode, (300, 200)), kind))
    assert answer.status_code == 201
    with client.websocket_connect(LIVE) as socket:
        viewer = Viewer(socket)
        viewer.say(type="start", prompt=RED, image=answer.json()["id"])
        assert viewer.wait_for("chunk")["frames"] == 1
    with client.websocket_connect(LIVE) as socket:
        Viewer(socket).say(type="start", prompt=RED, image=answer.json()["id"])
        assert "not there any more" in Viewer(socket).wait_for("error")["message"]
