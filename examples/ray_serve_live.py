"""Live videos on many machines: Ray Serve sends a session's requests to one replica, and any other can take it over.

    pip install 'wan-autoregressive[ray-serve]'
    python -m examples.ray_serve_live --states /shared/live --replicas 2

A viewer asks for one chunk after the other (`watch` below is a client) and says how many it has. The request is the
whole protocol:

    GET /?session=NAME&have=N[&prompt=…][&seed=…]          with the header  x-session-id: NAME

- **Routing.** The header is hashed to a replica, which keeps the rollout in memory. When replicas come and go some
  sessions move; that is only slower, never wrong.
- **State.** A chunk is handed out once the state after it is saved, so nothing that was seen is ever lost. The states
  after the newest chunk and the one before it are kept: a chunk whose answer was lost with its replica is made again.
- **`have`.** A rollout in memory that is not exactly where the viewer is (the session was elsewhere meanwhile, or an
  answer was lost) is put aside, and the state after `have` chunks taken up instead. The same request therefore always
  gives the same chunk, to the bit on the same kind of machine, and may be repeated at any time.

`prompt` holds from this chunk on; with `have=0` it begins the video.

Whoever can reach the port can watch and steer: put what knows your users in front. And whatever `--host` says, every
replica of Ray Serve (2.60) has a port of its own open on all interfaces, where it takes requests from other replicas:
run it in a network of its own, or with TLS between its parts (`RAY_USE_TLS`).
"""

from __future__ import annotations

import argparse
import io
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
from filelock import FileLock
from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint
from wan_autoregressive.pipelines.session import RolloutSession


class LiveSessions:
    """The sessions of one replica. Knows nothing of Ray.

    Args:
        model: Folder of the checkpoint.
        states: Folder that all replicas see, whose locks (`flock`) hold across machines: NFS 4 has them.
        options: Of `pipe.rollout`, for every session.
        at_once: Sessions in memory; the one that was asked longest ago makes room, and comes back from its state.
    """

    def __init__(self, model: str, states: str, options: dict[str, Any], at_once: int = 4) -> None:
        import torch

        cuda = torch.cuda.is_available()
        pipe = WanAutoregressivePipeline.from_pretrained(model, dtype=torch.bfloat16 if cuda else torch.float32)
        self._pipe: Any = pipe.to("cuda" if cuda else "cpu")
        self._states, self._options, self._at_once = Path(states), options, at_once
        self._sessions: OrderedDict[str, RolloutSession] = OrderedDict()
        self._device = threading.Lock()

    def next_chunk(self, name: str, have: int, prompt: str | None = None, seed: int = 0) -> np.ndarray:
        """The chunk after the first `have` ones, (1, frames, height, width, 3) in uint8.

        Raises:
            ValueError: there is no such session, its state after `have` chunks is gone, or the name is none.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise ValueError(f"a session's name has 1 to 64 letters, digits, - and _; got {name!r}")
        self._states.mkdir(parents=True, exist_ok=True)
        with FileLock(self._states / f"{name}.lock"), self._device:  # one request of a session, on any replica
            session = self._sessions.pop(name, None)
            if session is None or session.num_chunks != have:
                session = self._open(name, have, prompt, seed)
            elif prompt is not None:
                session.set_prompt(prompt)
            session.advance()  # the prompt, then a chunk; there is no room for a second one
            saved = session.call(lambda rollout: rollout.save(self._slot(name, have + 1)))
            session.advance()
            made = session.get(timeout=0)
            saved.result()
            assert made is not None
            self._sessions[name] = session
            while len(self._sessions) > self._at_once:
                self._sessions.popitem(last=False)
            return np.asarray(made.chunk.frames)

    def _open(self, name: str, have: int, prompt: str | None, seed: int) -> RolloutSession:
        import torch

        if have == 0:
            if prompt is None:
                raise ValueError(f"session '{name}' begins with have=0; give a prompt")
            generator = torch.Generator("cpu").manual_seed(seed)
            rollout = self._pipe.rollout(prompt, generator=generator, output_type="uint8", **self._options)
        else:
            rollout = self._pipe.resume(self._slot(name, have))
            if rollout.chunks_done != have:
                raise ValueError(f"session '{name}' has {rollout.chunks_done} chunks by now; have={have} is long past")
            if prompt is not None:
                rollout.set_prompt(prompt)
        return RolloutSession(rollout, max_ahead=1)

    def _slot(self, name: str, num_chunks: int) -> Path:
        """Where the state after so many chunks is kept until there are two more."""
        return self._states / name / str(num_chunks % 2)

    def __call__(self, request: Request) -> Response:
        """A request over HTTP: the chunk as an .npy file."""
        asked = request.query_params
        try:
            have, seed = int(asked.get("have", "0")), int(asked.get("seed", "0"))
            frames = self.next_chunk(asked.get("session", ""), have, asked.get("prompt"), seed)
        except ValueError as error:
            return PlainTextResponse(str(error), status_code=409)
        body = io.BytesIO()
        np.save(body, frames)
        return Response(body.getvalue(), headers={"x-chunk": str(have), "x-replica": str(os.getpid())})


def live_app(
    model: str,
    states: str,
    options: dict[str, Any],
    replicas: int = 2,
    gpus: float = 0,
    sessions: type[LiveSessions] = LiveSessions,
) -> Any:
    """The application for `serve.run`."""
    router = RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
        request_router_kwargs={"num_fallback_replicas": 0},  # a busy replica is waited for
    )
    actor = {"num_cpus": 1, "num_gpus": gpus}
    live = serve.deployment(
        sessions, name="live", num_replicas=replicas, ray_actor_options=actor, request_router_config=router
    )
    return live.bind(model, states, options)


def watch(
    url: str, session: str, prompts: dict[int, str], seed: int = 0, have: int = 0, patience_s: float = 60.0
) -> Iterator[tuple[np.ndarray, str]]:
    """A client: chunk after chunk without end, whatever becomes of replicas; each with the process that made it.

    Args:
        prompts: By the chunk that they hold from.
        have: Chunks that the client has already.
        patience_s: How long one chunk may take, with all that is in its way.

    Raises:
        ValueError: the server refused the request.
        TimeoutError: no replica gave the chunk.
    """
    while True:
        asked: dict[str, Any] = {"session": session, "have": have, "seed": seed}
        if have in prompts:
            asked["prompt"] = prompts[have]
        frames, replica = _ask(url, asked, patience_s)
        yield frames, replica
        have += 1


def _ask(url: str, asked: dict[str, Any], patience_s: float) -> tuple[np.ndarray, str]:
    end = time.monotonic() + patience_s
    while True:
        try:
            answer = requests.get(url, params=asked, headers={"x-session-id": asked["session"]}, timeout=patience_s)
            if answer.status_code == 200:
                return np.load(io.BytesIO(answer.content)), answer.headers["x-replica"]
            if answer.status_code == 409:
                raise ValueError(answer.text)
            problem = f"{answer.status_code} {answer.text}"
        except requests.RequestException as error:
            problem = str(error)
        if time.monotonic() > end:
            raise TimeoutError(f"no chunk after {asked['have']} within {patience_s:g} s: {problem}")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve live videos with Ray Serve.")
    parser.add_argument("--states", required=True, help="folder that all machines see")
    parser.add_argument("--model", default=str(demo_checkpoint()), help="folder of the checkpoint (default: the demo)")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    for name, default in (("height", 64), ("width", 64), ("window_frames", 12), ("sink_frames", 3)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("height", "width", "window_frames", "sink_frames")}
    serve.start(http_options={"host": args.host, "port": args.port})
    app = live_app(args.model, args.states, options | {"position_mode": "sink_relative"}, args.replicas, args.gpus)
    serve.run(app, name="live", blocking=True)


if __name__ == "__main__":
    main()
