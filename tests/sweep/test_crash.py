"""Sweeps that are killed, that run twice at once, or that fill the disk: nothing is lost and nothing runs twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

KILLS = 24
SERVER = Path(__file__).parents[1] / "helpers" / "sweep_server.py"


class Server:
    """Forks sweeps (`sweep_server`)."""

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SERVER.parent), str(SERVER.parent.parent)])}
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _ask(self, line: str) -> list[str]:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().split()

    def start(self, folder: Path, csv: str = "out.csv") -> int:
        """Process id of a sweep in the store `folder`/cells."""
        return int(self._ask(f"{folder / 'cells'} {folder / csv} {folder / 'log'}")[0])

    def run(self, folder: Path, cells: Path | None = None, csv: str = "out.csv") -> int:
        """Exit code of a sweep."""
        return int(self._ask(f"{cells or folder / 'cells'} {folder / csv} {folder / 'log'} wait")[1])


@pytest.fixture(scope="module")
def server():
    found = Server()
    yield found
    found.process.stdin.close()
    found.process.wait(30)


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    server.run(tmp_path_factory.mktemp("first"))  # the server imports
    folder = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    assert server.run(folder) == 0
    return (folder / "out.csv").read_text(), time.monotonic() - began


def ended(pid: int) -> bool:
    """Whether a process that is not our child is gone, or only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_for(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def whole(folder: Path) -> None:
    """No file of the store is half-written."""
    for file in (folder / "cells").glob("*.json"):
        assert json.loads(file.read_text())["status"] == "done"


def once(folder: Path, cells: int) -> None:
    """Every finished cell was run once (a kill between saving and logging leaves it out of the log)."""
    counts = Counter((folder / "log").read_text().split())
    assert set(counts.values()) == {1}
    assert len(counts) <= cells


def test_killed_at_random_moments_and_resumed(server, undisturbed, tmp_path):
    wanted, seconds = undisturbed
    random.seed(0)
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"store-{runs}"
        folder.mkdir()
        for _ in range(12):
            pid = server.start(folder)
            time.sleep(random.uniform(0.0, 0.4 * seconds))
            if not ended(pid):
                os.kill(pid, signal.SIGKILL)
                kills += 1
            wait_for(pid)
            whole(folder)
        assert server.run(folder) == 0
        assert (folder / "out.csv").read_text() == wanted
        once(folder, 12)
        runs += 1


def test_two_processes_on_one_store(server, undisturbed, tmp_path):
    for turn in range(3):
        folder = tmp_path / f"shared-{turn}"
        folder.mkdir()
        pids = [server.start(folder, f"{i}.csv") for i in range(2)]
        for pid in pids:
            wait_for(pid)
        assert {(folder / f"{i}.csv").read_text() for i in range(2)} == {undisturbed[0]}
        once(folder, 12)
        assert len((folder / "log").read_text().split()) == 12


def test_a_full_disk_is_one_sentence_and_loses_nothing(server, undisturbed, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=72k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        assert server.run(tmp_path, small / "cells") == 2
        message = (tmp_path / "log").read_text()
        assert "no space left" in message
        assert "finished cells are kept" in message
        kept = {file: file.read_text() for file in (small / "cells").glob("*.json")}
        assert kept
        assert all(json.loads(text)["status"] == "done" for text in kept.values())
        (tmp_path / "log").unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        assert server.run(tmp_path, small / "cells") == 0
        assert (tmp_path / "out.csv").read_text() == undisturbed[0]
        assert all(file.read_text() == text for file, text in kept.items())
        assert len((tmp_path / "log").read_text().split()) == 12 - len(kept)
    finally:
        subprocess.run(["umount", str(small)], check=False)
