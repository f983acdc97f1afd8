"""`wan-ar serve` as a process: what it prints, and that a video outlives it."""

import json
import socket

import httpx2
import pytest
from live_server import ServerProcess
from websockets.sync.client import connect

from wan_autoregressive.scripts import cli
from wan_autoregressive.scripts.generate_flags import parse_flags
from wan_autoregressive.scripts.serve_settings import read_settings
from wan_autoregressive.server.messages import unpack

RED = "a red circle moving right on a navy background"


def watch(port: int, count: int, **start) -> tuple[str, dict[int, bytes]]:
    """The session and its next chunks by index, one ahead at a time."""
    session, chunks = "", {}
    with connect(f"ws://127.0.0.1:{port}/v1/live", max_size=2**24) as live:
        live.send(json.dumps({"type": "start", "ahead": 1, **start}))
        while len(chunks) < count:
            message = live.recv(timeout=60)
            if isinstance(message, str):
                session = json.loads(message).get("session", session)
                continue
            header, body = unpack(message)
            chunks[header["index"]] = body
            live.send(json.dumps({"type": "played", "chunk": header["chunk"]}))
    return session, chunks


@pytest.mark.slow
def test_a_video_goes_on_after_a_restart_to_the_bit(tmp_path):
    words = ("--state", str(tmp_path / "state"))
    server = ServerProcess(*words, log=tmp_path / "first.log")
    assert server.link == f"http://127.0.0.1:{server.port}/"
    _, whole = watch(server.port, 6, prompt=RED, seed=9)
    session, _ = watch(server.port, 2, prompt=RED, seed=9)
    assert server.stop() == 143
    again = ServerProcess(*words, log=tmp_path / "second.log")
    found, rest = watch(again.port, 2, resume=session)
    again.stop()
    assert found == session
    assert min(rest) in (2, 3)  # one may have been on its way when the viewer left
    assert rest == {index: whole[index] for index in rest}


@pytest.mark.slow
def test_a_stranger_gets_no_token_and_the_log_neither(tmp_path):
    """And a state folder is one server's."""
    token, log = "a-token-to-be-kept", tmp_path / "log"
    words = ("--host", "0.0.0.0", "--token", token, "--state", str(tmp_path / "state"), "--sampler", "rolling")
    server = ServerProcess(*words, log=log)
    for query in (f"?token={token}", "?token=wrong", ""):
        httpx2.get(f"http://127.0.0.1:{server.port}/{query}")
        httpx2.get(f"http://127.0.0.1:{server.port}/v1/live{query}", headers={"Upgrade": "nonsense"})
    with pytest.raises(RuntimeError, match="another server uses --state"):
        ServerProcess(*words, log=tmp_path / "second.log")
    with connect(f"ws://127.0.0.1:{server.port}/v1/live?token={token}") as live:
        assert json.loads(live.recv())["type"] == "hello"
    server.stop()
    assert token not in log.read_text()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--config", "rolling_forcing", "--model", "demo", "--window-frames", "9"),
        ("--sampler", "recompute", "--steps", "1000,500", "--no-clean-pass", "--sink-frames", "3", "--shift", "7"),
        ("--preset", "longlive", "--kv-dtype", "int8", "--fps", "12", "--switch-policy", "flush"),
    ],
)
def test_settings_are_those_of_generate(words):
    parser = cli.build_parser(["serve"])
    found = read_settings(parser.parse_args(["serve", *words]))
    generated = parse_flags(["--config" if word == "--preset" else word for word in words])
    assert found == generated.config


def test_says_in_one_line_what_cannot_work(capsys, tiny_checkpoint):
    for words, message in (
        (("--slots", "0"), "--slots must be at least 1, got 0"),
        (("--port", "70000"), "--port must be at most 65535, got 70000"),
        (("--token", "x"), "--token must have at least 8 characters"),
        (("--checkpoint-every", "-1"), "--checkpoint-every must be at least 0, got -1"),
        (("--sampler", "magic"), "sampler is 'magic'; allowed are"),
        (("--model", str(tiny_checkpoint)), "a live video has no end"),
        (("--preview-vae", "nowhere"), "--preview-vae is 'nowhere', and there is no such file or folder"),
        (("--model", "nowhere"), "the model folder 'nowhere' does not exist"),
    ):
        assert cli.main(["serve", *words]) == 2
        assert message in capsys.readouterr().err


def test_an_address_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
        assert "cannot listen on 127.0.0.1:" in capsys.readouterr().err
