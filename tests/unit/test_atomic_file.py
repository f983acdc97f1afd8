"""Files that appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from wan_autoregressive import atomic_file
from wan_autoregressive.atomic_file import check_replaceable, replaced_file, write_text


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "x").write_text("old")
    return tmp_path / "x"


def only(path: Path) -> str:
    """What `path` holds, which is the only file in its folder."""
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return path.read_text()


@pytest.mark.parametrize("part", [None, "x.part"])
def test_the_new_content_takes_the_place_at_the_end(old: Path, part: str | None) -> None:
    with replaced_file(old, old.with_name(part) if part else None) as new:
        assert new.parent == old.parent
        new.write_text("new")
        assert old.read_text() == "old"
    assert only(old) == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert old.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [KeyError("boom"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_all_there_is(old: Path, error: BaseException) -> None:
    def fail_half_way() -> None:
        with replaced_file(old) as new:
            new.write_text("new")
            raise error

    with pytest.raises(type(error)):
        fail_half_way()
    assert only(old) == "old"


def test_a_disk_that_is_full_when_it_is_synced(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_file.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*/x'"):
        write_text(old, "new")
    assert only(old) == "old"


def test_links_are_replaced_and_never_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("x", "x.part"):
        (tmp_path / name).symlink_to(precious)
    with replaced_file(tmp_path / "x", tmp_path / "x.part") as new:
        new.write_text("new")
    assert (tmp_path / "x").read_text() == "new"
    assert precious.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "x"]


def test_names_that_cannot_be_written_are_found_before(tmp_path: Path, old: Path) -> None:
    check_replaceable(old)
    check_replaceable(tmp_path / "new")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in [("pipe", "is a pipe"), ("folder", "is a folder"), ("y" * 250, "File name too long")]:
        with pytest.raises(OSError, match=message):
            check_replaceable(tmp_path / name)
    with pytest.raises(OSError, match="Not a directory"):
        check_replaceable(old / "below a file")
