"""An interrupted fit goes on from its checkpoint, and ends as one that was never interrupted."""

from __future__ import annotations

import pytest
from filelock import FileLock
from fits import assert_same, of

from resting.benchmarks.errors import FitError


class Stopped:
    """Progress that ends with Ctrl-C at a step of training."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps: list[int] = []

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        if stage == "train":
            self.steps.append(done)
            if done == self.at:
                raise KeyboardInterrupt


def stopped(model, folder, at: int = 5, **more) -> None:
    with pytest.raises(KeyboardInterrupt):
        of(model, checkpoint=folder, progress=Stopped(at), **more)


COARSE = {"step": 0.25, "window": 8}
METHODS = {"spon-refined(teal)": {}, "spon-refined(teal-greedy)": {"inner": COARSE}}


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_that_of_a_fit_without_interruption(llama, tmp_path, method):
    stopped(llama, tmp_path / "part", method=method, **METHODS[method])
    again = Stopped()
    plan = of(llama, method, checkpoint=tmp_path / "part", progress=again, **METHODS[method])
    assert again.steps == [5, 6, 7, 8]  # the checkpoint is of step 4
    assert_same(plan, of(llama, method, **METHODS[method]))
    assert not (tmp_path / "part").exists()


def test_a_fit_that_is_stopped_again_and_again_ends_alike(llama, tmp_path):
    for at in (3, 6):
        stopped(llama, tmp_path / "part", at)
    assert_same(of(llama, checkpoint=tmp_path / "part"), of(llama))


OTHERS = {
    "target": {"target": 0.4},
    "method": {"method": "spon(teal)"},
    "steps": {"steps": 6},
    "seed": {"seed": 1},
    "text": {"text": ["w1 w2 w3 w4 w5 w6 w7 w8 " * 10, "w9 w8 w7 w6 w5 w4 w3 w2 w1 " * 10] * 8 + ["w5 w6 " * 20]},
    "windows": {"windows": 30},
}


def test_another_fit_never_goes_on_from_it_and_leaves_it(llama, tmp_path):
    stopped(llama, tmp_path / "part")
    for change in OTHERS.values():
        first = Stopped(1)
        with pytest.raises(KeyboardInterrupt):  # at its own first step
            of(llama, **({"checkpoint": tmp_path / "part", "progress": first} | change))
    of(llama, "teal", checkpoint=tmp_path / "part")
    resumed = Stopped()
    of(llama, checkpoint=tmp_path / "part", progress=resumed)
    assert resumed.steps[0] == 5


def test_another_model_never_goes_on_from_it(llama, tmp_path):
    stopped(llama, tmp_path / "part")
    llama.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    llama.model.layers[0].mlp.up_proj.weight.data = llama.model.layers[0].mlp.up_proj.weight.data.clone()
    other = Stopped()
    of(llama, checkpoint=tmp_path / "part", progress=other)
    assert other.steps[0] == 1


def test_files_of_the_users_stay(llama, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    of(llama, "teal", checkpoint=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_checkpoint_is_said_and_stays(llama, tmp_path):
    stopped(llama, tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FitError, match=r"the checkpoint .* is damaged \(.*\): remove it, and the fit begins again"):
        of(llama, checkpoint=tmp_path)
    assert file.exists()
    file.unlink()
    assert_same(of(llama, checkpoint=tmp_path), of(llama))


def test_two_processes_do_not_fit_into_one_checkpoint(llama, tmp_path):
    stopped(llama, tmp_path)
    (folder,) = tmp_path.iterdir()
    with FileLock(folder / "lock"), pytest.raises(FitError, match="another process does this fit"):
        of(llama, checkpoint=tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_refused(llama, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FitError, match=r"the checkpoint .*file cannot be written: "):
        of(llama, checkpoint=tmp_path / "file")
