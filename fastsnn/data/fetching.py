"""One file from a URL, whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

BLOCK = 1 << 20


def fetch(url: str, path: str | os.PathLike, sha256: str, tries: int = 3, timeout: float = 60.0) -> Path:
    """Fetch a file to `path`, which exists only once its contents are right.

    What has come stands in `path` + ".part" meanwhile; a later try, or a later call, goes on from there where the server
    can. url: http, https or file. sha256: 64 hexadecimal digits. timeout: seconds without a byte.
    Raises ConnectionError where the transfer breaks off at every try, ValueError where the contents are wrong.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if not url.startswith(("http://", "https://", "file:")):
        raise ValueError(f"fetch: {url} is of an unknown kind; wanted http://, https:// or file:.")
    if path.exists() and _sha256(path) == sha256.lower():
        return path
    reason: Exception | None = None
    for _ in range(tries):
        resumed = part.exists()
        try:
            _transfer(url, part, timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416 and resumed:  # the part is no beginning of this file
                part.unlink()
            elif error.code < 500 and error.code not in (408, 429):  # asking again will not help
                raise ConnectionError(f"fetch: {url} answers {error.code} {error.reason}; wanted the file. Check the address.") from error
            reason = error
            continue
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and not isinstance(error, (urllib.error.URLError, ConnectionError, TimeoutError)):
                raise  # of this machine: a full disk, no permission
            reason = error
            continue
        found = _sha256(part)
        if found == sha256.lower():
            os.replace(part, path)
            return path
        part.unlink()
        reason = ValueError(f"fetch: {url} has the SHA-256 {found}; wanted {sha256.lower()}. Nothing was kept.")
        if not resumed:
            break
    if isinstance(reason, ValueError):
        raise reason
    raise ConnectionError(f"fetch: {url} broke off {tries} times, the last with: {reason}. What came is kept in {part}; the next call goes on from there.") from reason


def _transfer(url: str, part: Path, timeout: float) -> None:
    """Append what is missing of the file at `url` to `part`."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        continued = getattr(answer, "status", None) == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-")
        left = int(answer.headers["Content-Length"]) if answer.headers.get("Content-Length") else None
        with part.open("ab" if continued else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                left = None if left is None else left - len(block)
            file.flush()
            os.fsync(file.fileno())
    if left:
        raise ConnectionError(f"{left} bytes are missing at the end")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
