"""What is offered to a peer, and what is borne of it."""

from __future__ import annotations

from dataclasses import dataclass

from serving.http2.frames import DEFAULT_WINDOW, WINDOW_UPDATE, Setting, frame, settings_frame, uint32
from serving.http2.hpack import MAX_LIST_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may take.

    idle_frames: frames that bring nothing (pings, settings, resets, empty data), less those forgiven.
    """

    max_streams: int = 1024
    stream_window: int = 1024 * 1024
    connection_window: int = 16 * 1024 * 1024
    max_frame_size: int = 1024 * 1024
    idle_frames: int = 1000

    def greeting(self) -> bytes:
        """Write what a server begins with: its settings, and the connection's window, which no setting grows."""
        offered = {
            Setting.MAX_CONCURRENT_STREAMS: self.max_streams,
            Setting.INITIAL_WINDOW_SIZE: self.stream_window,
            Setting.MAX_FRAME_SIZE: self.max_frame_size,
            Setting.MAX_HEADER_LIST_SIZE: MAX_LIST_BYTES,
        }
        grown = uint32(self.connection_window - DEFAULT_WINDOW)
        return settings_frame(offered) + frame(WINDOW_UPDATE, 0, 0, grown)
