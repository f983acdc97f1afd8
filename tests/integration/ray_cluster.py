"""Ray for tests: on the loopback alone, in a folder that goes with it, and never missing without a word in CI."""

import importlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest

# Or else Ray takes the address of an interface for its own, and listens there.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def import_ray() -> Any:
    """Skips the module where Ray is not installed; CI sets `REQUIRE_RAY`, and it fails."""
    return importlib.import_module("ray") if os.environ.get("REQUIRE_RAY") else pytest.importorskip("ray")


@contextmanager
def local_ray(**resources: int) -> Iterator[None]:
    """A cluster of this machine, with resources of which Ray only counts how many are taken."""
    ray = import_ray()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as the names of its sockets must be
    handler = signal.getsignal(signal.SIGTERM)
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 100_000_000}
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Workers import what stands in for a pipeline, and the examples.
            patch.setenv("PYTHONPATH", os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 2)))
            ray.init(address="local", **resources, **options, _temp_dir=folder)
            yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in its place
        shutil.rmtree(folder, ignore_errors=True)


def assert_on_the_loopback_alone(pid: int) -> None:
    """A process and all that it started listen where no other machine can reach them."""
    addresses = set()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            sockets = process.net_connections("inet")
            addresses |= {ip_address(s.laddr.ip) for s in sockets if s.status == psutil.CONN_LISTEN}
    assert addresses  # of Ray's own
    addresses = {getattr(address, "ipv4_mapped", None) or address for address in addresses}
    assert all(address.is_loopback for address in addresses), addresses
