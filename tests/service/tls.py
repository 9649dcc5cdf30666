"""Certificates for servers of tests."""

import subprocess
from pathlib import Path


def certificate(folder: Path, name: str, host: str = "localhost") -> tuple[Path, Path]:
    """A certificate for `host` that signs itself, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={host}"]
    command += ["-addext", f"subjectAltName=DNS:{host}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key
