"""The page of all results: what it joins, what it escapes, and what it refuses."""

from __future__ import annotations

import html
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from page_folder import EVIL, RESULTS, embedded, read, rows, write_folder

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.page import boards, build, collect, marks, methods


def test_losses_of_the_first_table_are_those_of_results_csv(data):
    """Nats above dense, mean over texts, computed here from the perplexities alone."""
    count = 0
    for board in data["boards"]:
        for method, target, bytes_, nats, low, high, _, folder in board["points"]:
            name = data["folders"][folder]["name"]
            lines = [
                line
                for line in read(RESULTS / name / "results.csv")
                if line["tokens"] == board["tokens"] and line["model"] == board["model"] and line["value"]
            ]
            found, unread = [], []
            for text in board["texts"]:
                values = {
                    (line["method"], float(line["target"])): line
                    for line in lines
                    if line["metric"] == f"{text}_perplexity"
                }
                mine, dense = values[method, target], values["dense", 0.0]
                found.append(math.log(float(mine["value"]) / float(dense["value"])))
                unread.append(float(mine["byte_sparsity"]))
            assert nats == pytest.approx(sum(found) / len(found), rel=1e-3, abs=1e-5)
            assert bytes_ == pytest.approx(sum(unread) / len(unread), rel=1e-5)
            assert low <= nats <= high
            count += 1
    assert count > 10


def test_speeds_are_those_of_decode_csv(data):
    count = 0
    for one in data["timed"]:
        lines = read(RESULTS / data["folders"][one["folder"]]["name"] / "decode.csv")
        for method, target, speed, low, high, unread, limit, megabytes, per_second in one["points"]:
            threads = re.search(r", (\d+) CPU", one["dtype"])
            same = {"model": one["model"], "method": method, "dtype": one["dtype"].split(",")[0]}
            (line,) = [
                x
                for x in lines
                if same.items() <= x.items()
                and float(x["target"]) == target
                and (threads is None or x["threads"] == threads[1])
            ]
            shown = (speed, unread, limit, megabytes, per_second)
            names = ("speedup", "byte_sparsity", "limit", "bytes_per_token", "tokens_per_second")
            expected = [float(line[name]) / (1e6 if name == "bytes_per_token" else 1) for name in names]
            assert shown == pytest.approx(expected, rel=1e-5)
            assert low is None or low <= speed <= high
            count += 1
    assert count > 10


def test_a_loss_stands_beside_a_speed_of_the_same_weights_alone(data):
    assert any(one["random"] for one in data["timed"])
    for board in data["boards"]:
        for place in board["timed"]:
            assert data["timed"][place]["model"] == board["model"]
            assert not data["timed"][place]["random"]
    assert any(board["timed"] for board in data["boards"])


def test_the_times_that_are_shown_first_have_the_most_targets(data):
    several = [board for board in data["boards"] if len(board["timed"]) > 1]
    assert several
    for board in several:
        lost = {(method, target) for method, target, *_ in board["points"]}
        counts = [
            len({target for method, target, *_ in data["timed"][place]["points"] if (method, target) in lost})
            for place in board["timed"]
        ]
        assert counts == sorted(counts, reverse=True)


def test_a_gpu_has_no_threads(data):
    gpu = [one for one in data["timed"] if "NVIDIA" in one["dtype"]]
    assert gpu
    assert not any("thread" in one["label"] for one in gpu)
    assert not any("thread" in row["dtype"] for row in rows(data) if row["folder"] == "latency-7b-h200")


def test_means_and_ranks_over_tasks_by_hand(data):
    (table,) = data["tasks"]
    facts = json.loads((RESULTS / "tasks" / "provenance.json").read_text())
    about = next(cell["tasks"] for cell in facts["cells"] if cell["method"] == "dense")
    lines = read(RESULTS / "tasks" / "results.csv")
    target = table["lines"][0][1]
    shown = {line[0]: line for line in table["lines"] if line[1] == target}
    accuracy = {}
    for line in lines:
        task, _, metric = line["metric"].partition("/")
        if task in table["tasks"] and metric == about[task]["headline"] and line["value"]:
            accuracy.setdefault((line["method"], float(line["target"])), {})[task] = float(line["value"])
    ranks = {method: [] for method in shown}
    for task in table["tasks"]:
        values = {method: accuracy[method, target][task] for method in shown}
        for method, value in values.items():
            above = sum(v > value for v in values.values())
            ranks[method].append(1 + above + (sum(v == value for v in values.values()) - 1) / 2)
    for method, line in shown.items():
        each = [accuracy[method, target][task] for task in table["tasks"]]
        assert line[7:] == pytest.approx(each, rel=1e-5)
        assert line[2] == pytest.approx(sum(each) / len(each), rel=1e-5)
        assert line[6] == pytest.approx(sum(ranks[method]) / len(ranks[method]), rel=1e-5)


def test_methods_have_a_line_a_paper_and_code_that_is_there(data):
    about = {one["name"]: one for one in data["methods"]}
    assert about["teal"]["arxiv"] == "2408.14690"
    assert about["spon"]["paper"].endswith("2512.12744")
    for name in ("teal", "spon", "mean-error"):
        assert about[name]["line"].endswith(".")
        assert (RESULTS.parents[2] / about[name]["code"].removeprefix("../")).is_file()
    assert "columns" not in about  # a kernel is no method
    found = methods.about(["teal", "oracle", "proxy"], "")
    assert {one["name"]: one["bound"] for one in found} == {"teal": False, "oracle": True, "proxy": False}


def test_every_number_of_a_suite_is_there(data):
    shown = {
        (row["folder"], row["model"], row["method"], row["metric"], row["tokens"], row["target"], row["seed"]): row
        for row in rows(data)
    }
    count = 0
    for file in RESULTS.rglob("results.csv"):
        folder = file.parent.relative_to(RESULTS).as_posix()
        for row in read(file):
            if "metric" not in row:
                continue
            key = (folder, row["model"], row["method"], row["metric"], row["tokens"], float(row["target"]))
            found = shown[(*key, int(row["seed"]))]
            for name in ("value", "stderr", "n", "difference", "difference_low"):
                if row.get(name):
                    assert found[name] == pytest.approx(float(row[name]), rel=1e-6)
                else:
                    assert found[name] is None
            count += 1
    assert count == sum(not row["metric"].startswith(("decode/", "kernel/", "codes/")) for row in rows(data)) > 100


def test_times_of_products_from_codes_are_there(tmp_path):
    folder = shutil.copytree(RESULTS / "latency", tmp_path / "bytes-latency")
    facts = json.loads((folder / "provenance.json").read_text())
    facts["suite"]["name"] = "bytes-latency"
    (folder / "provenance.json").write_text(json.dumps(facts))
    about = {"matrix": "64x48", "dtype": "bfloat16", "threads": 1}
    timed = {"seconds": 2e-3, "speedup": 1.8, "over_plain": 3.5, "share": 0.9, "bandwidth": 1e9, "reason": ""}
    frame = [about | {"weights": "int8", "kernel": "codes", "sparsity": 0.5} | timed]
    frame += [about | {"weights": "int8", "kernel": "torch int8", "sparsity": 0.0} | timed | {"speedup": 1.0}]
    frame += [about | {"weights": "int3-g128", "reason": "there is no CPU kernel"}]
    pd.DataFrame(frame).to_csv(folder / "quantised.csv", index=False)
    (one,) = collect.folders(tmp_path)
    of = one.rows[one.rows.metric.str.startswith("codes/")]
    assert set(of.model) == {"matrix 64x48 (int8)", "matrix 64x48 (int3-g128)"}
    found = of[(of.method == "codes") & (of.target == 0.5)].set_index("metric").value
    assert dict(found) == {f"codes/{name}": timed[name] for name in collect.CODE_TIMES}
    assert of.weights.isna().all()
    (lacking,) = of[of.reason == "there is no CPU kernel"].itertuples()
    assert (lacking.method, lacking.target, np.isnan(lacking.value)) == ("codes", 0.0, True)
    page = build.write(tmp_path).read_text()
    assert "Kernels from codes" in page
    assert "quantised.csv" in page


def test_every_time_is_there(data):
    shown = {
        (row["folder"], row["model"], row["method"], row["dtype"], row["metric"], row["target"]): row["value"]
        for row in rows(data)
    }
    for file in RESULTS.rglob("decode.csv"):
        folder = file.parent.relative_to(RESULTS).as_posix()
        for row in read(file):
            on = json.loads((file.parent / "provenance.json").read_text())["measured_on"]["device"]
            where = on if on != "cpu" else f"{row['threads']} CPU thread{'s' if row['threads'] != '1' else ''}"
            key = folder, row["model"], row["method"], f"{row['dtype']}, {where}"
            for name in ("speedup", "tokens_per_second", "sparse_p99"):
                if row[name]:
                    assert shown[(*key, f"decode/{name}", float(row["target"]))] == pytest.approx(float(row[name]))


def test_studies_are_shown_as_they_are(data):
    for study in data["studies"]:
        lines = read(RESULTS / data["folders"][study["folder"]]["name"] / "results.csv")
        for name, values in zip(study["columns"], study["values"], strict=True):
            found = [None if line[name] == "" else type(v)(line[name]) for v, line in zip(values, lines, strict=True)]
            assert found == values
    assert data["studies"]


def test_numbers_lead_to_the_machine_of_their_cell(data):
    for row in rows(data):
        if row["folder"] in ("baselines-wide", "baselines") and row["method"] == "teal":
            facts = json.loads((RESULTS / row["folder"] / "provenance.json").read_text())
            same = {"method": "teal", "target": row["target"], "seed": row["seed"], "tokens": row["tokens"]}
            cell = next(cell for cell in facts["cells"] if same.items() <= cell.items())
            assert data["machines"][row["machine"]] == facts["machines"][cell["measured_on"]]
            assert row["seconds"] == cell["seconds"]


def test_best_and_noise_of_a_column(data):
    wide = [row for row in rows(data) if row["folder"] == "baselines-wide" and row["metric"] == "wikitext2_perplexity"]
    column = [row for row in wide if row["target"] == 0.5 and row["tokens"] == "all-but-first-1"]
    best = min(column, key=lambda row: row["value"])
    assert [row["method"] for row in column if row["mark"] == marks.BEST] == [best["method"]]
    for row in column:
        if row["mark"] == marks.TIED:
            assert row["loss_low"] <= best["loss_high"]


def test_direction_of_metrics():
    assert marks.direction("wikitext2_perplexity") == marks.direction("gsm8k_reference/nats_per_byte") == -1
    assert marks.direction("decode/sparse_p50") == -1
    assert marks.direction("piqa/acc_norm") == marks.direction("decode/speedup") == 1
    assert marks.direction("decode/dense_p50") == marks.direction("something_new") == 0


def test_page_asks_for_nothing(page):
    # Papers are links, which only a reader follows.
    assert set(re.findall(r"https?://[^/\"]+/", page)) <= {"https://arxiv.org/"}
    assert not re.search(r"""(?:src|href)=["']?(?://|http)""", page)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in html.unescape(page)


def test_page_is_small_and_the_same_again(page, tmp_path):
    assert len(page.encode()) < 4e5
    write_folder(tmp_path / "one")
    assert build.render(tmp_path) == build.render(tmp_path)


def test_names_are_escaped(tmp_path):
    write_folder(tmp_path / EVIL.replace("/", "∕"), model=EVIL, method=EVIL, title=EVIL)
    page = build.render(tmp_path)
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert embedded(page)["rows"]["strings"]["model"] == [EVIL]


def test_infinite_and_missing_values(tmp_path):
    write_folder(tmp_path / "one", values={"dense": "20.0", "teal": "inf", "cats": ""})
    found = {row["method"]: row["value"] for row in rows(embedded(build.render(tmp_path)))}
    assert found == {"dense": 20.0, "teal": "inf", "cats": None}


def test_within_noise_without_single_values(tmp_path):
    write_folder(tmp_path / "one", values={"dense": "20.0", "teal": "24.0", "cats": "25.0", "chess": "29.0"}, stderr=1)
    found = {row["method"]: row["mark"] for row in rows(embedded(build.render(tmp_path)))}
    assert found == {"dense": 0, "teal": marks.BEST, "cats": marks.TIED, "chess": 0}


def test_no_results(tmp_path):
    with pytest.raises(BenchmarkError, match="no results under"):
        build.render(tmp_path)
    with pytest.raises(BenchmarkError, match="not a folder"):
        build.write(tmp_path / "none")


def test_unfinished_folders_are_left_alone(tmp_path):
    write_folder(tmp_path / "one")
    (tmp_path / "two.partial").mkdir()
    (tmp_path / "two.partial" / "results.csv").write_text("")
    assert [folder.name for folder in collect.folders(tmp_path)] == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("results.csv", "metric,value\na,1\n", "has no column 'model'; it needs model, method"),
        ("results.csv", 'metric,"value\na,1,2,3\n', "is no CSV table"),
        ("provenance.json", "{", "is not JSON"),
        ("provenance.json", "{}", "is not what a run writes"),
        ("provenance.json", None, "cannot be read"),
        ("windows.parquet", "no parquet", "cannot be read"),
        ("decode-raw.parquet", "no parquet", "cannot be read"),
        ("decode.csv", "model,dtype\n", "has no column 'threads'; it needs model, dtype, threads, method, target"),
    ],
)
def test_broken_folder_names_the_file(tmp_path, name, content, said):
    write_folder(tmp_path / "one")
    file = tmp_path / "one" / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(BenchmarkError) as error:
        build.render(tmp_path)
    assert str(file) in str(error.value)
    assert said in str(error.value)


def test_value_that_is_no_number(tmp_path):
    write_folder(tmp_path / "one", values={"dense": "twenty"})
    with pytest.raises(BenchmarkError, match=r"results\.csv, column value"):
        build.render(tmp_path)


def test_command(tmp_path, capsys, monkeypatch):
    from resting.benchmarks.cli import main

    write_folder(tmp_path / "one")
    monkeypatch.setattr("sys.argv", ["resting", "page", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as done:
        main.main()
    assert done.value.code in (0, None)
    assert capsys.readouterr().out == f"wrote {tmp_path / 'index.html'}\n"
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(SystemExit) as failed:
        main.main()
    assert failed.value.code == 2


def part(place, losses):
    """What a folder lost, by method and target."""
    return boards.Part(place, ("m",), ["news"], {key: [0.5, nats, nats, nats, 1] for key, nats in losses.items()})


@pytest.mark.parametrize(
    ("mine", "its", "agree"),
    [(0.400, 0.409, True), (0.400, 0.411, False), (4.593, 4.578, True), (4.593, 4.500, False)],
)
def test_folders_agree_within_a_hundredth_of_a_nat_or_of_a_large_loss(mine, its, agree):
    one, other = part(0, {("teal", 0.5): mine, ("spon(teal)", 0.5): 0.3}), part(1, {("teal", 0.5): its})
    assert one.agrees(other) == other.agrees(one) == agree


def test_a_method_of_several_folders_is_of_the_one_with_most_points(tmp_path, monkeypatch):
    """Of more methods at one target, and of fewer at two: the curve is kept."""
    many = part(0, {(name, 0.5): 0.4 for name in ("teal", "cats", "was")})
    curve = part(1, {("teal", 0.25): 0.1, ("teal", 0.5): 0.4, ("was", 0.25): 0.1, ("was", 0.5): 0.4})
    for one in (many, curve):
        one.key = ("m", "w", "bfloat16", 4, "all-but-first-1", (("news", 44),))
    monkeypatch.setattr(boards, "_parts", lambda place, _: [(many, curve)[place]])
    folders = [collect.Folder(tmp_path, name, {}, [{}]) for name in ("many", "curve")]
    (board,) = boards.boards(folders, [])
    found = {(method, target): place for method, target, *_, place in board["points"]}
    assert found == {("teal", 0.25): 1, ("teal", 0.5): 1, ("was", 0.25): 1, ("was", 0.5): 1, ("cats", 0.5): 0}
