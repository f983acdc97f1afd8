"""Prompts to begin with, for who does not know yet what to type."""

from __future__ import annotations

from wan_autoregressive.demo import demo_checkpoint
from wan_autoregressive.server.live_model import LiveModel

# The demo knows colours, shapes and directions alone.
_DEMO = (
    "a red circle moving right on a navy background",
    "a green cross moving left on a navy background",
    "a yellow square moving up on a black background",
    "a blue triangle moving down on a white background",
    "a cyan circle moving up on a gray background",
    "a purple cross moving right on a black background",
    "a red square moving down on a white background",
)
_WAN = (
    "A fox trots through fresh snow at the edge of a pine forest, low winter sun, tracking shot",
    "Snow falls thickly, the fox looks up and shakes it off its fur",
    "Night has fallen over the forest, the fox walks on in the light of the full moon",
    "A small sailing boat on a calm sea at sunset, gentle waves, seen from the shore",
    "A storm comes up, the boat rides over high dark waves, rain and spray",
    "A street in an old town in the rain, people with umbrellas, shop lights on wet stones",
    "The sun comes out, the street dries, people close their umbrellas",
)


def quick_prompts(model: LiveModel) -> tuple[str, ...]:
    """Seven that the model can show, one for each of the keys 1 to 7."""
    return _DEMO if model.name == demo_checkpoint().name else _WAN
