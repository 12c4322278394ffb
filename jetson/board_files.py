"""Device files under a root folder, each of which may be missing, empty, odd or denied: then that is said, and nothing ends.

`root` is "/" on a machine and a recorded tree in a test.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

MOST = 1 << 20  # bytes of a device file that are read
WORDS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EAGAIN: "the device gives no value now (EAGAIN), as when it has no power",
    errno.EISDIR: "a folder, expected a file",
}


@dataclass
class Files:
    """Reads files below a root, and keeps why one could not be read."""

    root: Path
    unread: dict[str, str] = field(default_factory=dict)  # path without the root: why

    def text(self, path: str, *, said: bool = True) -> str | None:
        """A file's content without its last line break and zero bytes; None where there is none.

        Args:
            said: keep why it could not be read; False for files that only some machines have.
        """
        # not by open(): a powered-down zone answers EAGAIN, on which Python's text layer raises TypeError
        try:
            number = os.open(self.root / path.lstrip("/"), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                parts, size = [], 0
                while size < MOST and (part := os.read(number, 1 << 16)):
                    parts.append(part)
                    size += len(part)
            finally:
                os.close(number)
        except OSError as error:
            self.lost(path, WORDS.get(error.errno or 0, error.strerror or type(error).__name__), said)
            return None
        found = b"".join(parts).decode("utf-8", errors="replace").strip("\0 \r\n\t")
        if not found:
            self.lost(path, "the file is empty", said)
        return found or None

    def number(self, path: str, *, said: bool = True) -> int | None:
        """A file's content as a whole number."""
        found = self.text(path, said=said)
        if found is None:
            return None
        try:
            return int(found, 0)
        except ValueError:
            self.lost(path, f"{found[:40]!r} is no whole number", said)
            return None

    def names(self, folder: str, pattern: str = "*") -> list[str]:
        """Paths in a folder that fit a pattern, in the order of their numbers; none where there is no such folder."""
        below = self.root / folder.lstrip("/")
        try:
            found = [f"/{p.relative_to(self.root).as_posix()}" for p in below.glob(pattern)]
        except OSError as error:
            self.lost(folder, WORDS.get(error.errno or 0, error.strerror or type(error).__name__), True)
            return []
        return sorted(found, key=lambda p: [int(x) if x.isdigit() else 0 for x in "".join(c if c.isdigit() else " " for c in p).split()] + [p])

    def exists(self, path: str) -> bool:
        try:
            return (self.root / path.lstrip("/")).exists()
        except OSError:
            return False

    def lost(self, path: str, why: str, said: bool) -> None:
        if said:
            self.unread[path] = why

    def why(self, *paths: str) -> str:
        """Why files could not be read, as one phrase: "cannot be read: ..."."""
        known = [f"{p}: {self.unread[p]}" for p in paths if p in self.unread]
        return f"cannot be read: {'; '.join(known)}" if known else "cannot be read"
