"""Why there is no line to the server, in words for the person who can mend it."""

from __future__ import annotations

from typing import Any

#: What gRPC's text has in it, with certificates and without, and what that means. The first that fits counts.
_MEANINGS: list[tuple[str, str]] = [
    ("ping timeout", "it does not answer any more"),
    ("keepalive watchdog timeout", "it does not answer any more"),
    ("Stream removed", "the line was cut"),
    ("Connection refused", "nobody listens there yet"),
    ("Connection timed out", "no answer from there: is the port open in the firewall, and the address right?"),
    ("No route to host", "no way leads there"),
    ("Network is unreachable", "no way leads there"),
    ("errors resolving", "no address is known for this name"),
    (
        "Hostname Verification Check failed",
        "the server's certificate is not for this address: give --server, or --server_name, as the certificate says it",
    ),
    ("CERTIFICATE_VERIFY_FAILED: certificate has expired", "the server's certificate has expired"),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not signed by this site's ca.crt"),
    ("WRONG_VERSION_NUMBER", "it speaks no TLS: a server that is --insecure, or another program"),
    ("Failed parsing HTTP/2", "another program listens there"),
    ("Method not found", "another gRPC service listens there"),
    ("Handshake read failed", "it does not answer: frozen, or not a hosfl server"),
]
_CLOSED = "Socket closed", "Connection reset by peer"
_REFUSES = (
    "it closes the line at once: it does not accept this site's certificate (is it of the server's CA, and valid by "
    "the server's clock?), or is no hosfl server"
)
_WANTS_TLS = "it closes the line at once: if it wants certificates, give --certs and no --insecure"
_LONGEST = 300


def reason(error: Any, secure: bool) -> str:
    """One line for what gRPC says; what is not known is said as gRPC says it.

    Args:
        error: gRPC's.
        secure: Whether this side shows a certificate.
    """
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if not callable(code) or not callable(details):
        return " ".join(str(error).split())[:_LONGEST]
    text = " ".join(str(details()).split())
    for words, meaning in _MEANINGS:
        if words in text:
            return meaning
    if "failed to connect" in text and any(words in text for words in _CLOSED):
        return _REFUSES if secure else _WANTS_TLS
    return f"{code().name}: {text}"[:_LONGEST]
