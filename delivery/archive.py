"""Archives that are the same bytes for the same content."""

import gzip
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: bytes) -> str:
    """Return the SHA-256 of `content` in hex."""
    return hashlib.sha256(content).hexdigest()


def flush(path: Path) -> None:
    """Have a file's content, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place(partial: Path, target: Path) -> None:
    """Give a complete file its name; its content is on disk first, so that no power cut empties it."""
    flush(partial)
    partial.replace(target)
    flush(target.parent)


def copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.copyfile(source, partial)
    place(partial, target)


def write(target: Path, files: Mapping[str, Path | bytes], time: int = 0, compress: bool = True) -> None:
    """Write `files` (name in the archive to a file or its content) as a tar to `target`, whole or not at all.

    Owner, mode, order and `time` (seconds since 1970) are fixed, so that equal content gives equal bytes.
    Content that is compressed already, as wheels are, is not worth the time of `compress`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    level = 6 if compress else 0
    with (
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=level, fileobj=raw, mtime=time) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in sorted(files):
            content = files[name]
            data = content.read_bytes() if isinstance(content, Path) else content
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), time, 0o644
            tar.addfile(info, io.BytesIO(data))
    place(partial, target)
