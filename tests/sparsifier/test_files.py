"""Files that several writers replace."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from resting.sparsifier import Plan, Rule, Site
from resting.sparsifier.files import replacing, replacing_folder


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    path = tmp_path / "folder" / "file"
    texts = [str(i) * 100_000 for i in range(8)]

    def write(text: str) -> None:
        for _ in range(20):
            with replacing(path) as temporary:
                temporary.write_text(text)
            assert path.read_text() in texts

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, texts))
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def permissions(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder.parent)): stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize(("mask", "folders", "files"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_a_saved_plan_has_the_permissions_of_the_umask(tmp_path, mask, folders, files):
    before = os.umask(mask)
    try:
        Plan({Site(0, "q"): Rule(threshold=torch.ones(3))}, "x", 0.5, 0.5, "m").save(tmp_path / "plan")
    finally:
        os.umask(before)
    wanted = {"plan": folders, "plan/plan.json": files, "plan/rules.safetensors": files}
    assert permissions(tmp_path / "plan") == wanted


def test_a_folder_is_replaced_whole_and_where_a_link_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with replacing_folder(tmp_path / "link") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "new").write_text("new")
    assert [p.name for p in (tmp_path / "real").rglob("*")] == ["inner", "new"]
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")

    def write() -> None:
        with replacing_folder(tmp_path / "a") as temporary:
            (temporary / "new").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "old"]
