"""A small GIF of a video: `python tools/demo_gif.py outputs/demo-prompts.mp4 outputs/demo.gif`."""

import argparse
import sys
from pathlib import Path

from wan_autoregressive.media.ffmpeg import INPUT_LIMITS, file_url, run_ffmpeg, time_limit_s

SIZE = 128  # pixels, height and width
FPS = 8
COLORS = 16  # flat shapes need few
FILTERS = (
    f"fps={FPS},scale={SIZE}:{SIZE}:flags=neighbor,split[frames][sample];"
    f"[sample]palettegen=max_colors={COLORS}[palette];[frames][palette]paletteuse=dither=none"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("gif", type=Path)
    options = parser.parse_args(arguments)
    words = [*INPUT_LIMITS, "-i", file_url(options.video), "-lavfi", FILTERS, "-y", file_url(options.gif)]
    _, problem = run_ffmpeg(words, time_limit_s(options.video))
    if problem is not None:
        print(f"cannot make '{options.gif}': {problem}", file=sys.stderr)
        return 1
    print(f"{options.gif}: {options.gif.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
