"""How long a line may be silent, and how much may be sent on it."""

from __future__ import annotations

from dataclasses import dataclass

METHOD = "/hosfl.Rounds/Join"
"""The one call of the service: a stream of frames each way."""


@dataclass(frozen=True)
class Limits:
    """Of the line between a server and a client.

    Args:
        frame_bytes: Longest frame.
        streams: Most connections at a time.
        handshakes: New streams a minute of one peer's address.
        keepalive: Seconds of silence after which the other side is asked whether it is there.
        ping_timeout: Seconds within which it must answer; gRPC's own 20 would notice a silent peer after a minute.
        frames_ahead: Frames of one client that wait for the server; then its stream is not read on.
        outbox_bytes: What waits to be read by one client at most; one that reads nothing loses its stream.
        farewell: Seconds for reading what waits once a stream is to end; then it is cut.

    Raises:
        ValueError: One that is not positive.
    """

    frame_bytes: int = 1 << 30
    streams: int = 1024
    handshakes: int = 240
    keepalive: float = 10.0
    ping_timeout: float = 4.0
    frames_ahead: int = 4
    outbox_bytes: int = 1 << 31
    farewell: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name} must be > 0, got {value}")

    def channel_options(self) -> list[tuple[str, int]]:
        """As gRPC takes them, for either side."""
        return [
            ("grpc.max_receive_message_length", self.frame_bytes),
            ("grpc.max_send_message_length", self.frame_bytes),
            ("grpc.keepalive_time_ms", round(self.keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.ping_timeout * 1000)),
            ("grpc.http2.ping_timeout_ms", round(self.ping_timeout * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", round(self.keepalive * 500)),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", round(self.keepalive * 500)),
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),  # nothing connects anywhere but to the address that is given
        ]
