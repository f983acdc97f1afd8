"""The engine's figures in the text format that Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping

from wan_autoregressive.server.figures import STAGES

_HELP = {
    "steps": ("counter", "steps_total", "Chunks made"),
    "repeated": ("counter", "repeated_steps_total", "Chunks made again to go back to a place"),
    "frames": ("counter", "frames_total", "Pixel frames made"),
    "step_s": ("counter", "step_seconds_total", "Seconds in steps"),
    "bytes": ("counter", "chunk_bytes_total", "Bytes of encoded chunks"),
    "cuts": ("counter", "cuts_total", "Changes of prompt and forks"),
    "dropped": ("counter", "dropped_chunks_total", "Chunks made ahead that a change of prompt cut off"),
    "failures": ("counter", "failures_total", "Sessions that failed"),
    "slots": ("gauge", "slots", "Sessions that can be watched at a time"),
    "active": ("gauge", "sessions_active", "Sessions with a slot"),
    "queued": ("gauge", "sessions_queued", "Sessions that wait for a slot"),
    "leaving": ("gauge", "sessions_leaving", "Sessions that are being saved"),
    "parked": ("gauge", "sessions_parked", "Videos without a viewer"),
}


def metrics_text(figures: Mapping[str, float]) -> str:
    """One block of lines per figure."""
    lines = []
    for key, (kind, name, text) in _HELP.items():
        lines += [*_head(name, kind, text), f"wan_ar_{name} {figures[key]:.10g}"]
    name = "stage_seconds_total"
    lines += _head(name, "counter", "Seconds of chunks by stage")
    lines += [f'wan_ar_{name}{{stage="{stage}"}} {figures[f"{stage}_s"]:.10g}' for stage in STAGES]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP wan_ar_{name} {text}", f"# TYPE wan_ar_{name} {kind}"]
