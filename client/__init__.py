"""A Python client of the live server: videos as they are made. Needs the extra `serve`.

`AsyncLiveClient` awaits, `LiveClient` waits; `conversation` holds what is said and understood, `connection` comes back
by itself where it was lost.
"""

from wan_autoregressive.client.async_client import AsyncLiveClient
from wan_autoregressive.client.connection import LiveError
from wan_autoregressive.client.conversation import Conversation, LiveChunk
from wan_autoregressive.client.live_client import LiveClient

__all__ = ["AsyncLiveClient", "Conversation", "LiveChunk", "LiveClient", "LiveError"]
