"""Files that are written whole or not at all."""

import errno
import os
import secrets
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays there
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".part"


def write_whole(
    path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]
) -> None:
    """Replaces the file at path by what ``write`` writes into the file that it gets.

    The new file is made beside the old one, as ``.NAME.*.part``, and takes its place
    once it is on the disk. What killed processes have left there is removed. The rest
    is as for ``open``: a link is followed, an existing file keeps its mode, a new one
    has what the umask leaves.

    Raises:
      OSError: the path cannot be that of a file, or the file cannot be written, on a
        full disk for instance; what was there is as before.
    """
    target = _target(path)
    outer = sys.exception()
    try:
        with _aside(target) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows renames no open file
                os.replace(file.name, target)
            except BaseException:
                with suppress(OSError):
                    os.unlink(file.name)
                raise
    except Exception as error:
        cause = _os_error(error, outer)
        if cause is None:
            raise
        raise OSError(
            cause.errno, f"{path} was not written and is as before: {cause}"
        ) from error
    # A rename that is not on the disk is undone by a power cut. Where a directory
    # cannot be synced, that much is left to the system.
    with suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _target(path: str | os.PathLike[str]) -> Path:
    """The file that path leads to, which need not be there yet."""
    target = Path(os.path.realpath(os.fsdecode(path)))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"{target.parent} is not a folder. Make it first", str(path)
        )
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(
            errno.EISDIR, "the path is a folder. Name a file in it", str(path)
        )
    if not stat.S_ISREG(mode):
        raise OSError(
            errno.EINVAL, "the path is a device or a pipe. Name a file", str(path)
        )
    return target


def _aside(target: Path) -> IO[bytes]:
    """A new file beside target, locked for as long as its process writes it."""
    # At most 50 characters of the name, since it may be as long as names can be.
    start = str(target.with_name(f".{target.name[:50]}."))
    _remove_left_over(start)
    while True:
        file = open(f"{start}{secrets.token_hex(8)}{SUFFIX}", "xb")  # noqa: SIM115
        if fcntl is not None:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # another process has removed it before it was locked
    with suppress(FileNotFoundError):
        os.chmod(file.name, stat.S_IMODE(target.stat().st_mode))
    return file


def _remove_left_over(start: str) -> None:
    """Removes such files whose process is gone, and with it the lock."""
    if fcntl is None:
        return
    with suppress(OSError):
        for found in Path(start).parent.iterdir():
            if str(found).startswith(start) and found.name.endswith(SUFFIX):
                with suppress(OSError), open(found, "r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    found.unlink()


def _os_error(error: BaseException, outer: BaseException | None) -> OSError | None:
    """The refusal of the system that ended in error, if one did.

    torch.save says "unexpected pos" where the disk is full; what the system said is
    the context of that. ``outer`` was raised before, and is no cause.
    """
    at: BaseException | None = error
    while at is not None and at is not outer:
        if isinstance(at, OSError):
            return at
        at = at.__context__
    return None
