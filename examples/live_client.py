"""A video on a live server whose prompt changes while it is made.

wan-ar serve &
python examples/live_client.py http://127.0.0.1:8000/ video.mp4
"""

import sys

from wan_autoregressive.client import LiveClient

RED, GREEN = "a red circle moving right on a navy background", "a green cross moving left on a navy background"

with LiveClient(sys.argv[1]) as live:
    live.start(RED, seed=7)
    for chunk in live:
        print(f"chunk {chunk.chunk}: {chunk.frames} frames from {chunk.start_frame} on, {chunk.prompt}", flush=True)
        if chunk.index == 2:
            live.set_prompt(GREEN)
        if chunk.index == 6:
            break
    live.download(sys.argv[2])
    live.forget()
