"""The engine's figures in the text format that Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping

_HELP = {
    "steps": ("counter", "steps_total", "Chunks made"),
    "repeated": ("counter", "repeated_steps_total", "Chunks made again to go back to a place"),
    "step_s": ("counter", "step_seconds_total", "Seconds in steps"),
    "encode_s": ("counter", "encode_seconds_total", "Seconds in encoding"),
    "bytes": ("counter", "chunk_bytes_total", "Bytes of encoded chunks"),
    "failures": ("counter", "failures_total", "Sessions that failed"),
    "active": ("gauge", "sessions_active", "Sessions with a slot"),
    "queued": ("gauge", "sessions_queued", "Sessions that wait for a slot"),
    "parked": ("gauge", "sessions_parked", "Videos without a viewer"),
}


def metrics_text(figures: Mapping[str, float]) -> str:
    """One block of lines per figure."""
    lines = []
    for key, (kind, name, text) in _HELP.items():
        name = f"wan_ar_{name}"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {figures[key]:.10g}"]
    return "\n".join(lines) + "\n"
