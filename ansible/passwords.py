"""Keep passwords where Ansible never looks for host names, for their owner alone.

python ansible/passwords.py DIRECTORY [OLD]     OLD: where versions before had them; what is there is moved
"""

import contextlib
import os
import stat
import sys
from pathlib import Path


def same(old: Path, new: Path) -> bool:
    """Return whether nothing is lost when one takes the place of the other."""
    if not os.path.lexists(new):
        return True
    return old.is_file() and new.is_file() and old.read_bytes() == new.read_bytes()


def move(old: Path, new: Path) -> None:
    """Move what is in one directory to another beside it, or nothing where something would be lost."""
    if not os.path.lexists(new):
        old.rename(new)
        return
    different = [path.name for path in sorted(old.iterdir()) if not same(path, new / path.name)]
    if different:
        sys.exit(
            f"{old} and {new} differ in {', '.join(different)}. Of each remove the one that the machines do "
            "not have, and run this again: they have what the version that ran site.yml last had."
        )
    for path in old.iterdir():
        if (new / path.name).exists():
            path.unlink()
        else:
            path.rename(new / path.name)
    old.rmdir()


def close(path: Path, mode: int) -> bool:
    """Give a path its mode, and return whether others are kept out now."""
    with contextlib.suppress(OSError):
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
    with contextlib.suppress(FileNotFoundError):
        return not path.stat().st_mode & 0o077
    return True  # a lock of another run


def main() -> int:
    """Move and close what the command line names, and say what people have to know of it."""
    directory, old = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None
    try:
        if old and old.is_dir():
            move(old, directory)
            print(  # noqa: T201 - the command's answer
                f"{old} is {directory} now, where Ansible reads no host names. What names files there, such "
                "as haproxy_certificates or a .gitignore of yours, needs the new name. A checkout of a "
                f"version before needs the old one: mv -T {directory} {old}"
            )
        if not directory.is_dir():
            return 0
        # The directory first: it closes all the others.
        closed = [close(directory, 0o700)]
        closed += [
            close(path, 0o600) for path in directory.iterdir() if path.is_file() and not path.is_symlink()
        ]
    except OSError as error:
        sys.exit(f"Cannot keep passwords in {directory}: {error}")
    if not all(closed):
        print(  # noqa: T201 - the command's answer
            f"Others on this computer can read the passwords in {directory}: its file system keeps no modes "
            "(WSL, a shared folder), or it belongs to another user. Move it where modes are kept, such as "
            "~/winemon-passwords, and set winemon_secrets_dir to that."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
