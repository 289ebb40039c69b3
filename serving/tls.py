"""TLS of the sockets that this server listens on."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Literal, NoReturn


class TlsInvalid(Exception):
    """Certificates can't be used as configured; the text is for whoever runs the server, and holds no secret."""


def server_context(
    cert: Path | None, key: Path | None, client_ca: Path | None, protocol: Literal["http/1.1", "h2"]
) -> ssl.SSLContext | None:
    """Return what TLS connections are accepted with; None where there is no certificate.

    cert: the chain in PEM, the server's own first. key: its private key; None where it stands in `cert`. client_ca:
    who must have signed the certificate that every client then has to show. protocol: what ALPN answers; clients of
    gRPC refuse a server that does not say h2. Raises TlsInvalid.
    """
    if cert is None:
        if key is not None or client_ca is not None:
            raise TlsInvalid("--tls-key and --tls-client-ca say nothing without --tls-cert, the server's certificate")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 at least
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols([protocol])
    for path in (cert, key, client_ca):
        _look(path)
    try:
        context.load_cert_chain(cert, key, password=_refuse_to_ask)
    except ssl.SSLError:
        named = f"the certificate {cert} and the key {key}" if key is not None else f"the file {cert}"
        raise TlsInvalid(f"{named} are not PEM that fits together: a chain, and the key of its first") from None
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError:
            raise TlsInvalid(f"the file {client_ca} of --tls-client-ca holds no certificate in PEM") from None
    return context


def server_options(context: ssl.SSLContext | None, *, handshake_s: float, end_s: float) -> dict[str, Any]:
    """Return what a loop's `create_server` is told to accept TLS connections; nothing where there is no context.

    end_s: seconds in which a client has to read the rest and agree to the end.
    """
    if context is None:
        return {}
    return {"ssl": context, "ssl_handshake_timeout": handshake_s, "ssl_shutdown_timeout": end_s}


def _look(path: Path | None) -> None:
    if path is None:
        return
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise TlsInvalid(f"the file {path} can't be read: {error.strerror}") from None


def _refuse_to_ask() -> NoReturn:
    """Stand in for OpenSSL's own question for a passphrase, which would wait on a terminal."""
    raise TlsInvalid("the private key is encrypted: decrypt it with `openssl pkey`, and protect the file")
