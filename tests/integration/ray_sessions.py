"""The sessions of `examples/ray_serve_live.py` in replicas that listen on the loopback alone."""

from typing import Any

from examples.ray_serve_live import LiveSessions


class LoopbackSessions(LiveSessions):
    """Serve opens a port for each replica on all interfaces, once this is made; not in tests."""

    def __init__(self, *args: Any) -> None:
        from ray.serve._private import replica

        add = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))
        super().__init__(*args)
