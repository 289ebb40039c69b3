"""What a client says of the connection itself: settings, windows, pings and resets, and how much of it is borne."""

from __future__ import annotations

from serving.grpc_api.frames import (
    ACK,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    LARGEST_WINDOW,
    PING,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    SMALL_FRAME,
    Broken,
    frame,
    unpack_setting,
)
from serving.grpc_api.guard import Guard
from serving.grpc_api.sending import Sending

_MOST_SETTINGS = 32


class Controlled(Sending):
    """Answers frames that ask for nothing. `last`: the youngest stream. `settled`: the client's settings have come."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(guard)
        self.last = 0
        self.settled = False

    def tire(self, kind: int) -> None:
        """Note a frame that brings nothing. Raises Broken where there are too many."""
        self.idle_frames += 1
        if self.idle_frames > self.guard.patience.frames:
            # The words by which clients know to ping less often.
            reason = "too_many_pings" if kind == PING else "too many frames that bring nothing, or calls that are reset"
            raise Broken(ENHANCE_YOUR_CALM, reason, "flood")

    def _control(self, kind: int, flags: int, identity: int, payload: bytes) -> None:
        self.tire(kind)
        if kind == PING:
            if len(payload) != 8 or identity:
                raise Broken(FRAME_SIZE_ERROR, "a ping has 8 bytes and no stream")
            if not flags & ACK:
                self.transport.write(frame(PING, ACK, 0, payload))
        elif kind == SETTINGS:
            self._settings(flags, identity, payload)
        elif kind == RST_STREAM:
            self._left_stream(identity, payload)
        elif kind == PUSH_PROMISE:
            raise Broken(PROTOCOL_ERROR, "clients push nothing")

    def _left_stream(self, identity: int, payload: bytes) -> None:
        if len(payload) != 4 or identity == 0 or identity > self.last:
            raise Broken(PROTOCOL_ERROR, "a reset of no stream")
        stream = self.streams.pop(identity, None)
        if stream is not None:
            stream.left()
            self._done()

    def _grow(self, identity: int, payload: bytes) -> None:
        grown = int.from_bytes(payload, "big") & LARGEST_WINDOW
        if len(payload) != 4 or identity > self.last:
            raise Broken(PROTOCOL_ERROR, "a window of no stream")
        if identity == 0:
            self.room += grown
            if not grown or self.room > LARGEST_WINDOW:
                raise Broken(FLOW_CONTROL_ERROR, "a window that grows by nothing, or too far")
            if self._blocked:
                self._pump_all()
            return
        stream = self.streams.get(identity)
        if stream is not None:
            stream.room += grown
            if not grown or stream.room > LARGEST_WINDOW:
                self.reset(stream, FLOW_CONTROL_ERROR)
                stream.left()
            elif stream.out is not None:
                self._pump(stream)

    def _settings(self, flags: int, identity: int, payload: bytes) -> None:
        if identity or len(payload) % 6 or (flags & ACK and payload):
            raise Broken(FRAME_SIZE_ERROR, "settings that are none")
        if flags & ACK:
            return
        if len(payload) > 6 * _MOST_SETTINGS:
            raise Broken(ENHANCE_YOUR_CALM, "too many settings in a frame", "flood")
        self.settled = True
        room = self.first_room
        for key, value in unpack_setting(payload):
            if key == 4:
                if value > LARGEST_WINDOW:
                    raise Broken(FLOW_CONTROL_ERROR, "a window that is too large")
                room = value
            elif key == 5:
                if not SMALL_FRAME <= value < 2**24:
                    raise Broken(PROTOCOL_ERROR, "a frame size that is none")
                self.largest = value
        if room != self.first_room:
            for stream in self.streams.values():
                stream.room += room - self.first_room
            self.first_room = room
        self.transport.write(frame(SETTINGS, ACK, 0))
        self._pump_all()
