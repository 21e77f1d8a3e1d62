"""TLS for both transports, from files that may be replaced while the server runs.

Each new connection is greeted with what the files held when they were last looked at and fitted together; connections
that are open stay as they are.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from dataclasses import dataclass

# Read at run time too: front processes are told of files by the types of these fields.
from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Any, cast

import grpc

from cascadeserve.errors import InvalidArtefact

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the certificate with its chain, its key, and whose clients are let in (None: everybody's)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.certificate, self.key) if self.client_ca is None else (self.certificate, self.key, self.client_ca)


class Tls:
    """What is in force, for HTTP and for gRPC."""

    def __init__(self, files: TlsFiles) -> None:
        """Read the files.

        Raises:
            InvalidArtefact: one of them is missing or no PEM, the key is another certificate's or asks for a password.

        """
        self._files = files
        self._stamp = _stamp(files)
        self._context = _server_context(files)
        self._grpc = _grpc_configuration(files)
        self._grpc_given = self._grpc

    def http_context(self) -> ssl.SSLContext:
        """Make what to listen with; it follows the files."""
        front = _Front(ssl.PROTOCOL_TLS_SERVER)
        front.newest = lambda: self._context
        return front

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Make what to listen with; it follows the files."""

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            # None: no other than what was given before
            newest, self._grpc_given, former = self._grpc, self._grpc, self._grpc_given
            return None if newest is former else newest

        mutual = self._files.client_ca is not None
        # The stubs do not know that it may return None.
        fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch)
        return grpc.dynamic_ssl_server_credentials(self._grpc, fetcher, require_client_authentication=mutual)

    async def follow_files(self) -> None:
        """Look at the files for ever, and take over what is new."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self.refresh()

    def refresh(self) -> bool:
        """Take over the files if they changed; those that do not fit together are left for the next time."""
        stamp = _stamp(self._files)
        if stamp == self._stamp:
            return False
        try:
            context, configuration = _server_context(self._files), _grpc_configuration(self._files)
        except InvalidArtefact as error:
            self._stamp = stamp  # said once
            _log.error("TLS stays as it is: %s", error)
            return False
        if _stamp(self._files) != stamp:
            return False  # changed meanwhile: next time
        self._stamp, self._context, self._grpc = stamp, context, configuration
        _log.info("TLS: took over new files, certificate %s", self._files.certificate)
        return True


class _Front(ssl.SSLContext):
    """Begins each connection with the newest context.

    To exchange the context of a connection that has begun would be too late: with TLS 1.2 its session may have been
    taken up again by then, and with it a client whose authority is gone. Each context remembers its own sessions only.
    """

    newest: Callable[[], ssl.SSLContext]

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:  # noqa: ANN401 - those of the ssl module
        """Begin a connection."""
        return self.newest().wrap_bio(*arguments, **options)


def _stamp(files: TlsFiles) -> tuple[tuple[int, int, int] | None, ...]:
    stamps: list[tuple[int, int, int] | None] = []
    for path in files.paths:
        try:
            found = path.stat()
            stamps.append((found.st_ino, found.st_size, found.st_mtime_ns))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


def _server_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # A ticket would bring back a client whose certificate is not accepted any more. Sessions of TLS 1.2 are taken up
    # again also without one, but by this context only.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    for path in files.paths:
        _read(path)

    def no_password() -> str:
        raise InvalidArtefact("the key asks for a password; give one without", path=files.key)

    try:
        context.load_cert_chain(files.certificate, files.key, password=no_password)
    except (ssl.SSLError, OSError) as error:
        raise InvalidArtefact(
            f"is no PEM certificate of the key {files.key} ({_reason(error)})", path=files.certificate
        ) from None
    if files.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(files.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise InvalidArtefact(f"holds no PEM certificate ({_reason(error)})", path=files.client_ca) from None
    return context


def _grpc_configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    client_ca = None if files.client_ca is None else _read(files.client_ca)
    return grpc.ssl_server_certificate_configuration([(_read(files.key), _read(files.certificate))], client_ca)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror})", path=path) from None


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or "broken"
