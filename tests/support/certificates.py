"""TLS certificates for tests."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from programs import program

ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Certificates:
    """A CA, and a server's and a client's certificate for this machine, as PEM files."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def cert(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"


def make_certificates(folder: Path) -> Certificates:
    """Makes them with `openssl`."""
    openssl, made = program("openssl"), Certificates(folder)
    new = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2"]
    ca = ["-subj", "/CN=Tests", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    _run(*new, "-keyout", made.key("ca"), "-out", made.ca, *ca)
    for name in ("server", "client"):
        about = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{ADDRESS},DNS:localhost"]
        leaf = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "keyUsage=critical,digitalSignature"]
        issuer: list[str | Path] = ["-CA", made.ca, "-CAkey", made.key("ca")]
        _run(*new, *issuer, "-keyout", made.key(name), "-out", made.cert(name), *about, *leaf)
    return made


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
