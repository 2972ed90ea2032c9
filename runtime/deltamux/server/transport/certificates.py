"""The server's certificate and key: what is wrong with them is told before the engine loads."""

import base64
import ssl
from pathlib import Path

from deltamux.errors import FailedPreconditionError
from deltamux.server.options import ServeOptions

TAKEN = "it takes PEM without a byte-order mark, and keys of RSA, or of ECDSA on P-256 or P-384"
"""What gRPC's TLS (BoringSSL) takes, in words; Python's (OpenSSL) takes more."""

UNTAKEN_KEYS = {b"\x06\x03\x2b\x65\x70": "Ed25519", b"\x06\x05\x2b\x81\x04\x00\x23": "ECDSA on P-521"}
"""Kinds of key with which gRPC serves, and that its clients refuse, by their object identifiers in DER."""

VERIFY_CODES = (9, 10, 26)
"""OpenSSL's codes of certificates that are not valid yet, have expired, or are for another purpose than a server."""


def check_tls(options: ServeOptions) -> None:
    """Raises FailedPreconditionError, reason TLS_FILES, for an unusable certificate or key."""
    if options.tls_cert is None or options.tls_key is None:
        return
    certificate, key = pem(options.tls_cert), pem(options.tls_key)
    if b"-----BEGIN CERTIFICATE-----" not in certificate:
        raise tls_files_error(
            options.tls_cert, "holds no certificate in PEM; --tls-cert is the certificate, with its chain"
        )
    if b"PRIVATE KEY-----" not in key:
        raise tls_files_error(options.tls_key, "holds no private key in PEM; --tls-key is the certificate's key")
    if b"ENCRYPTED" in key:
        raise tls_files_error(
            options.tls_key, "is encrypted; give a key without a passphrase, readable by the server alone"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(cadata=certificate.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise tls_files_error(options.tls_cert, "holds a damaged certificate") from None
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise tls_files_error(options.tls_key, f"is not the key of the certificate in {options.tls_cert}") from None
        raise tls_files_error(
            options.tls_key, f"cannot be used with {options.tls_cert}: {error.reason or error}"
        ) from None
    if kind := next((kind for mark, kind in UNTAKEN_KEYS.items() if mark in _der(key)), None):
        raise tls_files_error(options.tls_key, f"is of {kind}, which gRPC's clients refuse: {TAKEN}")
    if problem := _client_problem(context, certificate.decode("ascii", "ignore")):
        raise tls_files_error(options.tls_cert, f"would be refused by every client: {problem}")


def _der(key: bytes) -> bytes:
    """Returns the bytes of a private key in PEM."""
    lines = key.partition(b"PRIVATE KEY-----")[2].partition(b"-----END")[0]
    return base64.b64decode(lines, validate=False)


def _client_problem(server: ssl.SSLContext, certificate: str) -> str | None:
    """Returns why a client that trusts the certificate refuses it, such as for its dates; by a handshake in memory."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # by which name clients connect is not known
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=certificate)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    for end in ends * 2:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as error:
            return error.verify_message if error.verify_code in VERIFY_CODES else None
        except ssl.SSLError:
            return None
    return None


def pem(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise tls_files_error(file, f"cannot be read: {error.strerror}") from None


def tls_files_error(file: Path, problem: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"TLS: {file} {problem}", reason="TLS_FILES", metadata={"file": str(file)})
