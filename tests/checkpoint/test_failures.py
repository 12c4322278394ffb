"""A failing world: whichever call fails or whenever the process is killed, the folder is the old one or the new one."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import content, save_checkpoint

from flashhead_edge.checkpoint import atomic, open_source, read_index, read_published, update_index, write_checkpoint
from flashhead_edge.errors import FlashHeadError

CALLS = ("write", "fsync", "rename", "mkdir", "link", "copy_file_range")


class Failing:
    """Lets the nth call fail of all that change the disk; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int, error: Callable[[], BaseException], exchange: bool) -> None:
        self.nth, self.error, self.calls = nth, error, 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        opened = os.open
        writing = self.wrap(opened)
        monkeypatch.setattr(os, "open", lambda path, flags, *rest, **options: (writing if flags & os.O_CREAT else opened)(path, flags, *rest, **options))
        real: Callable[..., Any] = atomic.exchange if exchange else lambda new, old: False
        monkeypatch.setattr(atomic, "exchange", self.wrap(real))

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.nth:
                raise self.error()
            return real(*args, **options)

        return call


@pytest.fixture(scope="module")
def states(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An old and a new checkpoint that differ in their index."""
    folder = tmp_path_factory.mktemp("states")
    return {"old": save_checkpoint(model_folder, folder / "old", margin=1.0), "new": save_checkpoint(model_folder, folder / "new", margin=2.0)}


def run_all(
    tmp_path: Path, error: Callable[[], BaseException], caught: type[BaseException], exchange: bool, job: Callable[[Path], None], old: Path | None, new: str
) -> int:
    """Fail the 1st, 2nd, 3rd ... call until none is left; after each the folder is old or new, and a next run works."""
    before = "absent" if old is None else content(old)
    seen = set()
    for nth in count(1):
        out = tmp_path / str(nth) / "out"
        out.parent.mkdir()
        if old is not None:
            shutil.copytree(old, out)
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, nth, error, exchange)
            try:
                job(out)
                failed = False
            except caught:
                failed = True
        state = content(out)
        seen.add((failed, state))
        assert state in ({before, new} if failed else {new}), f"call {nth}"
        if failing.calls < nth:
            break
        assert [n for n in os.listdir(out.parent) if n != "out"] == [], f"call {nth} left something"
        shutil.rmtree(out.parent)
    assert (True, before) in seen and (False, new) in seen
    return nth


def disk_full() -> BaseException:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("there", [False, True], ids=["new folder", "overwrite"])
@pytest.mark.parametrize("how", ["full", "interrupt"])
def test_every_call_fails_in_turn(how: str, there: bool, exchange: bool, model_folder: Path, states: dict[str, Path], tmp_path: Path) -> None:
    error, caught = (disk_full, FlashHeadError) if how == "full" else (KeyboardInterrupt, KeyboardInterrupt)

    def job(out: Path) -> None:
        save_checkpoint(model_folder, out, margin=2.0, overwrite=there)

    calls = run_all(tmp_path, error, caught, exchange, job, states["old"] if there else None, content(states["new"]))
    assert calls > 30  # the model's files, the assets, their flushes and the renames


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_every_call_of_an_update_fails_in_turn(exchange: bool, states: dict[str, Path], tmp_path: Path) -> None:
    index = read_index(states["new"])
    done = Path(shutil.copytree(states["old"], tmp_path / "done"))
    update_index(done, index)
    calls = run_all(tmp_path, disk_full, FlashHeadError, exchange, lambda out: update_index(out, index), states["old"], content(done))
    assert calls > 10  # index, configuration and card, their flushes and the exchange


def test_full_disk_is_said(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> int:
        raise disk_full()

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(FlashHeadError, match=r"out: writing failed, the disk is full; the folder is as it was or whole, so free space"):
        save_checkpoint(model_folder, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take fewer bytes than it was given."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    atomic.write_file(tmp_path / "a", [b"0123456789", b"", b"xyz"])
    assert (tmp_path / "a").read_bytes() == b"0123456789xyz"


@pytest.mark.parametrize("leftover", ["new", "old", "old alone", "lock"])
def test_leftovers_of_a_killed_run(leftover: str, model_folder: Path, states: dict[str, Path], tmp_path: Path) -> None:
    """What was left is removed by the next run; a folder that stood aside while its successor was missing comes back."""
    out = tmp_path / "out"
    if leftover == "lock":
        (tmp_path / ".out.flashhead-lock").touch()
    else:
        shutil.copytree(states["old"], tmp_path / f".out.flashhead-{leftover.split()[0]}")
        if leftover != "old alone":
            shutil.copytree(states["old"], out)
    save_checkpoint(model_folder, out, margin=2.0, overwrite=True)
    assert content(out) == content(states["new"]) and os.listdir(tmp_path) == ["out"]


def test_kill_at_random_times(model_folder: Path, states: dict[str, Path], tmp_path: Path) -> None:
    """kill -9 50 times while a process overwrites one checkpoint again and again, with either way to swap folders."""
    source, published = open_source(model_folder), read_published(states["old"])
    both, whole = [read_index(states[s]) for s in ("new", "old")], {content(p) for p in states.values()}
    out, moments, found, leftovers = tmp_path / "out", random.Random(13), [], 0
    shutil.copytree(states["old"], out)
    for turn in range(50):
        child = os.fork()  # prepared here, so that 50 writers start at once; it writes with numpy alone
        if child == 0:
            try:
                if turn % 5 == 0:
                    atomic.exchange = lambda new, old: False
                for i in count(turn):
                    write_checkpoint(source, out, both[i % 2], published, overwrite=True)
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the writer failed before it was killed"
        if turn % 5 == 0 and not out.exists():  # the moment between two renames: the next run mends it
            assert content(tmp_path / ".out.flashhead-old") in whole
            continue
        found.append(content(out))
        assert found[-1] in whole
        leftovers += len(os.listdir(tmp_path)) > 1
    assert set(found) == whole and leftovers > 10  # both were seen, and kills did fall into writes
    write_checkpoint(source, out, both[0], published, overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and content(out) == content(states["new"])
