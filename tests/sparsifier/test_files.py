"""Files that several writers replace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from resting.sparsifier.files import replacing


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
