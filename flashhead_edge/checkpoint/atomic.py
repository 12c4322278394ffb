"""Writing a folder so that it is the old one or the new one at every moment, whatever fails or is killed.

The new folder is written beside the old one as `.NAME.flashhead-new`, every file and folder is flushed to the disk,
then the two change places in one step (Linux renameat2 with RENAME_EXCHANGE); where the system or the file system
cannot do that, the old folder is first set aside as `.NAME.flashhead-old`, and a run that dies between the two renames
is repaired by the next. A lock file keeps two writers apart, so that what a killed run left can be removed safely.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from flashhead_edge.errors import CheckpointError, FlashHeadError

log = logging.getLogger(__name__)
CHUNK = 1 << 24  # bytes copied or written together
RENAME_EXCHANGE = 2
AT_FDCWD = -100
CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EBADF, errno.EPERM)
SPARE = 16 << 20  # bytes left free for folders and the file system's own books


def write_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write and flush a new file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for part in parts:
            _write_all(fd, memoryview(part))
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data[:CHUNK]) :]


def copy_file(source: Path, path: Path) -> None:
    """Copy a file byte for byte and flush it; a file system that shares blocks may do so.

    Raises:
        CheckpointError: the source became shorter or longer meanwhile.
    """
    with source.open("rb") as old:
        size = os.fstat(old.fileno()).st_size
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            done = _copy_range(old.fileno(), fd, size)
            old.seek(done)
            while part := old.read(CHUNK):
                _write_all(fd, memoryview(part))
                done += len(part)
            os.fsync(fd)
        finally:
            os.close(fd)
    if done != size:
        raise CheckpointError(f"{source}: {done:,} bytes were copied of {size:,}, so the file changed meanwhile; leave it alone and run again")


def _copy_range(old: int, new: int, size: int) -> int:
    """Copy inside the kernel, where it can: bytes copied from the start."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < size:
        try:
            part = os.copy_file_range(old, new, min(size - done, 1 << 30), done, done)
        except OSError as error:
            if error.errno in CANNOT:
                break
            raise
        if part == 0:
            break
        done += part
    os.lseek(new, done, os.SEEK_SET)
    return done


def link_or_copy(source: Path, path: Path) -> None:
    """A second name for a file whose first name is about to go; a copy where the file system has no links."""
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in (*CANNOT, errno.EMLINK, errno.EACCES):
            raise
        copy_file(source, path)


def flush_folder(path: Path) -> None:
    """Flush a folder's list of names; some file systems cannot and need not."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    finally:
        os.close(fd)


def flush_tree(path: Path) -> None:
    """Flush every file and folder below and including `path`."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        flush_folder(Path(folder))


def exchange(new: Path, old: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(old))


def _names(out: Path) -> tuple[Path, Path, Path]:
    return tuple(out.with_name(f".{out.name}.flashhead-{what}") for what in ("new", "old", "lock"))  # type: ignore[return-value]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, alone. The kernel lets go of it when the process ends, however it ends."""
    import fcntl

    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    break
        except BlockingIOError as error:
            os.close(fd)
            raise CheckpointError(f"{path.parent}: another flashhead is writing there ({path.name} is locked); wait until it is done") from error
        os.close(fd)  # the one before us removed its file between our two steps
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(fd)


def _repair(out: Path) -> None:
    """Put right what a killed run left; the lock is held."""
    new, old, _ = _names(out)
    if old.exists() and not out.exists():
        os.rename(old, out)
    for leftover in (new, old):
        if leftover.exists():
            log.warning("%s: removing what an interrupted run left", leftover)
            shutil.rmtree(leftover)


def check_space(folder: Path, needed: int, what: Path) -> None:
    """Raise FlashHeadError where a file system has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise FlashHeadError(f"{what}: {(needed + SPARE) / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free; free some space or choose another folder")


@contextlib.contextmanager
def replacing(out: Path, needed: int) -> Iterator[Path]:
    """An empty folder to fill; when the block ends well it becomes `out`, else `out` stays what it was.

    Args:
        out: absolute, links resolved; its parent folders are made.
        needed: bytes that will be written, checked before anything is.
    Raises:
        FlashHeadError: the disk is full or refuses.
        CheckpointError: another process writes the same folder.
    """
    new, old, lock = _names(out)
    with named_errors(out), _parents(out.parent):
        with _locked(lock):
            _repair(out)
            check_space(out.parent, needed, out)
            try:
                os.mkdir(new)
                yield new
                flush_tree(new)
                _swap(new, old, out)
            except BaseException:
                if old.exists() and not out.exists():  # the second of two renames failed
                    os.rename(old, out)
                shutil.rmtree(new, ignore_errors=True)
                raise
            try:
                flush_folder(out.parent)
            finally:
                for leftover in (new, old):
                    if leftover.exists():
                        shutil.rmtree(leftover, ignore_errors=True)  # the next run removes what stays


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; where the block fails, those that were made go again."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _swap(new: Path, old: Path, out: Path) -> None:
    if not out.exists():
        os.rename(new, out)
    elif not exchange(new, out):
        os.rename(out, old)
        os.rename(new, out)


@contextlib.contextmanager
def named_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system says into one sentence."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error)).lower()
        at = f" at {error.filename}" if error.filename and str(error.filename) != str(out) else ""
        raise FlashHeadError(f"{out}: writing failed, {reason}{at}; the folder is as it was or whole, so free space or mend the cause and run again") from error


def regular(path: Path) -> bool:
    """Whether a path is a file, links followed."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
