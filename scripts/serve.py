"""`wan-ar serve`: a page where a prompt becomes a video that changes while it plays."""

from __future__ import annotations

import argparse
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from wan_autoregressive.scripts.errors import print_note
from wan_autoregressive.scripts.load_pipeline import check_model_folder, load_pipeline, load_tiny_vae, model_folder
from wan_autoregressive.scripts.serve_settings import add_settings, read_settings

if TYPE_CHECKING:
    from wan_autoregressive.server.guard import Door
    from wan_autoregressive.server.live_model import LiveModel

_DESCRIPTION = """\
Serve a page where you type a prompt and the video plays, changes while it plays, and can be taken back. On 127.0.0.1
it is open; on any other address visitors need the link that is printed. Needs
pip install 'wan-autoregressive[serve]'."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `serve` to the command's subparsers."""
    parser = subparsers.add_parser("serve", help="serve a page with live video", description=_DESCRIPTION)
    place = parser.add_argument_group("address")
    place.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    place.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    place.add_argument("--token", help="what visitors have to know (default: made, except on 127.0.0.1)")
    place.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="further name of the server")
    place.add_argument("--allow-origin", action="append", default=[], metavar="URL", help="page that may use it")
    place.add_argument("--no-page", action="store_true", help="the API alone")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--slots", type=int, help="viewers at a time (default: as many as it proves fast enough for)")
    limits.add_argument("--queue", type=int, default=8, help="viewers that may wait (default: 8)")
    limits.add_argument("--idle", type=float, default=120.0, help="seconds until a silent viewer goes (default: 120)")
    limits.add_argument("--max-seconds", type=float, default=600.0, help="video of one session (default: 600)")
    limits.add_argument("--snapshots", type=int, default=8, help="places kept in memory to go back to (default: 8)")
    text = "connections of one address; 0 for any number, behind a proxy say (default: 32)"
    limits.add_argument("--per-address", type=int, default=32, metavar="COUNT", help=text)
    limits.add_argument("--state", type=Path, metavar="DIR", help="keep videos there, also after a restart")
    text = "with --state: save running videos so often, for a crash; 0 only when a viewer leaves (default: 8)"
    limits.add_argument("--checkpoint-every", type=int, default=8, metavar="CHUNKS", help=text)
    add_settings(parser)
    text = "tiny VAE that shows a chunk at once, while the model's own makes what is kept; or a folder of the model's"
    parser.add_argument("--preview-vae", type=Path, metavar="PATH", help=text)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes.

    Raises:
        ValueError: the model or a flag is wrong, or the extra is not installed.
        OSError: the address is taken, or the state folder cannot be written.
    """
    _check(args)
    try:
        from wan_autoregressive.server.app import build_app
        from wan_autoregressive.server.engine import Engine
        from wan_autoregressive.server.guard import Door
        from wan_autoregressive.server.limits import EngineLimits
        from wan_autoregressive.server.serving import web_server
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing; pip install 'wan-autoregressive[serve]'") from error

    door = Door(args.host, args.token, tuple(args.allow_host), tuple(args.allow_origin))
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(args.host, args.port))
        folder = args.state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wan-ar-serve-")))
        stack.enter_context(_hold_state(folder))
        model = _load(args)
        chunk_s, step_s = model.measure()
        limits = EngineLimits(
            slots=args.slots,
            queue=args.queue,
            max_seconds=args.max_seconds,
            snapshots=args.snapshots,
            checkpoint_every=args.checkpoint_every if args.state else 0,
        )
        engine = Engine(model, folder, limits, cost_s=step_s, chunk_s=chunk_s)
        app = build_app(engine, door, args.idle, page=not args.no_page)
        print_note(f"a chunk of {chunk_s:.2f} s takes {step_s:.2f} s; viewers at a time: {engine.slots}")
        print(_link(args.host, listening.getsockname()[1], door), flush=True)
        web_server(app, args.per_address).run(sockets=[listening])
    return 0


def _check(args: argparse.Namespace) -> None:
    least_of = {"slots": 1, "queue": 0, "idle": 1, "max_seconds": 1, "snapshots": 0, "port": 0}
    for name, least in (least_of | {"per_address": 0, "checkpoint_every": 0}).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value:g}")
    if args.port > 65535:
        raise ValueError(f"--port must be at most 65535, got {args.port}")
    if args.token is not None and len(args.token) < 8:
        raise ValueError("--token must have at least 8 characters; leave it out and one is made")


def _load(args: argparse.Namespace) -> LiveModel:
    from wan_autoregressive.server.live_model import LiveModel

    config = read_settings(args)
    check_model_folder(model_folder(config))
    if config.rollout.window_frames is None:
        raise ValueError("a live video has no end, so what it sees of its past must have one; set --window-frames")
    preview_vae, path = None, _preview_path(args.preview_vae, model_folder(config))
    pipe = load_pipeline(config)
    if path is not None:
        preview_vae = load_tiny_vae(path, config.tiny_vae_latents, pipe.transformer.dtype).to(pipe.device)
    name = model_folder(config).name
    return LiveModel(pipe, config.rollout_settings(), config.fps, config.scale, name, preview_vae)


def _preview_path(given: Path | None, model: Path) -> Path | None:
    if given is None:
        return None
    for path in (given, model / given):
        if path.exists():
            return path
    raise ValueError(f"--preview-vae is '{given}', and there is no such file or folder, not in '{model}' either")


@contextmanager
def _hold_state(folder: Path) -> Iterator[None]:
    """Keep other servers from the same videos, until the process ends, however it ends."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another server uses --state '{folder}'; stop it, or give another folder") from error
    try:
        yield
    finally:
        lock.release()


def _listen(host: str, port: int) -> socket.socket:
    """The address is ours, or known to be taken, before the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _link(host: str, port: int, door: Door) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + ("" if door.token is None else f"?token={door.token}")
