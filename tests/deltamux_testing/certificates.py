"""A certificate of localhost, signed by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_certificate(directory: Path, curve: str = "SECP256R1", *, days: int = 0) -> tuple[Path, Path]:
    """Writes a self-signed certificate for localhost and its key.

    Args:
        curve: of the key, by cryptography's name; "Ed25519" is one, too.
        days: from now to the middle of the two days for which the certificate is valid.
    """
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    edwards = curve == "Ed25519"
    key: Any = ed25519.Ed25519PrivateKey.generate() if edwards else ec.generate_private_key(getattr(ec, curve)())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, None if edwards else hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (directory / "key.pem").write_bytes(secret)
    return directory / "cert.pem", directory / "key.pem"
