"""The page of all results: what it joins, what it escapes, and what it refuses."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil

import pytest
from page_folder import EVIL, RESULTS, browse, find_browser, write_folder

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.page import build, collect, marks


@pytest.fixture(scope="module")
def page():
    return build.render(RESULTS)


@pytest.fixture(scope="module")
def data(page):
    return embedded(page)


def embedded(page):
    start = page.index(">", page.index('id="data"')) + 1
    return json.loads(page[start : page.index("</script>", start)])


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def rows(data):
    """The rows of a page as dicts."""
    columns, strings = data["rows"]["columns"], data["rows"]["strings"]
    out = []
    for place in range(len(columns["value"])):
        row = {name: values[place] for name, values in columns.items()}
        row |= {name: strings[name][row[name]] if row[name] >= 0 else None for name in strings}
        row["folder"] = data["folders"][row["folder"]]["name"]
        out.append(row)
    return out


def test_points_are_the_two_csv_files_joined(data):
    perplexity = {
        (row["method"], float(row["target"])): float(row["value"])
        for row in read(RESULTS / "baselines" / "results.csv")
        if row["metric"] == "wikitext2_perplexity" and row["tokens"] == "all-but-first-1" and row["value"]
    }
    expected = {}
    for row in read(RESULTS / "latency" / "decode.csv"):
        key = row["method"], float(row["target"])
        if (row["dtype"], row["threads"]) == ("float32", "1") and row["speedup"] and key in perplexity:
            expected[key] = float(row["speedup"]), math.log(perplexity[key] / perplexity["dense", 0.0])
    expected = {key: pair for key, pair in expected.items() if pair[1] <= data["ceiling"]}
    panel = next(one for one in data["panels"] if one["folder"] == "latency" and one["dtype"] == "float32")
    found = {
        (series["method"], point[0]): (point[1], point[4]) for series in panel["series"] for point in series["points"]
    }
    assert expected
    assert found.keys() == expected.keys()
    for key, pair in expected.items():
        assert found[key] == pytest.approx(pair, rel=1e-5)
    for series in panel["series"]:
        for _, speed, fast_low, fast_high, nats, low, high, _ in series["points"]:
            assert low <= nats <= high
            assert fast_low <= speed <= fast_high


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
    assert count == sum(not row["metric"].startswith(("decode/", "kernel/")) for row in rows(data)) > 100


def test_every_time_is_there(data):
    shown = {
        (row["folder"], row["model"], row["method"], row["dtype"], row["metric"], row["target"]): row["value"]
        for row in rows(data)
    }
    for file in RESULTS.rglob("decode.csv"):
        folder = file.parent.relative_to(RESULTS).as_posix()
        for row in read(file):
            threads = f"{row['threads']} thread{'s' if row['threads'] != '1' else ''}"
            key = folder, row["model"], row["method"], f"{row['dtype']}, {threads}"
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
    assert not re.search(r"https?://", page)
    assert not re.search(r"""(?:src|href)=["']?//""", page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in html.unescape(page)


def test_page_is_small_and_the_same_again(page):
    assert len(page.encode()) < 3e5
    assert build.render(RESULTS) == page


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


browser = find_browser()


@pytest.mark.skipif(browser is None, reason="no chromium on this machine")
class TestBrowser:
    def test_first_view(self, page, data, tmp_path):
        seen = browse(browser, page, tmp_path)
        shown = dict(re.findall(r'<tr data-method="([^"]+)"[^>]*>.*?<button[^>]*>([\d.]+)', seen))
        assert shown["teal"] == "31.51"
        assert shown["dense"] == "30.09"
        points = sum(len(series["points"]) for series in data["panels"][0]["series"])
        assert seen.count('class="point"') == points + 1  # and the dense model's

    def test_hash_filters(self, page, tmp_path):
        seen = browse(browser, page, tmp_path, "#method=teal")
        assert set(re.findall(r'<tr data-method="([^"]+)"', seen)) == {"teal"}
        seen = browse(browser, page, tmp_path, "#suite=tasks&metric=piqa%2Facc&q=wina,chess")
        assert set(re.findall(r'<tr data-method="([^"]+)"', seen)) == {"wina", "chess", "chess-attention"}

    def test_sorting_by_hash(self, page, tmp_path):
        address = "#suite=baselines&metric=wikitext2_perplexity&tokens=all-but-first-1&sort=0.25&order=down"
        seen = browse(browser, page, tmp_path, address)
        table = seen[seen.index('id="table"') :]
        found = [float(v) for v in re.findall(r"<tr data-method=[^>]*>.*?<button[^>]*>([\d.]+)", table)]
        assert found == sorted(found, reverse=True)
        assert len(re.findall('aria-sort="descending"', table)) == 1

    def test_study(self, page, tmp_path):
        seen = browse(browser, page, tmp_path, "#suite=method/spon-prune-pruning&method=teal")
        assert re.findall(r"<details( hidden)?[^>]*><summary>([^<]+)<", seen)
        shown = re.search(r'<details open="">.*?</details>', seen, flags=re.DOTALL).group()
        lines = [line for line in read(RESULTS / "method/spon-prune-pruning/results.csv") if line["method"] == "teal"]
        assert shown.count("<tr>") == len(lines) + 1

    def test_number_opens_where_it_comes_from(self, page, tmp_path):
        press = """<script>document.querySelector('tr[data-method="teal"] .number').click()</script>"""
        # What the page says to the browser would keep this script from running.
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace(
            "</body>", f"{press}</body>"
        )
        seen = browse(browser, page, tmp_path)
        shown = re.search(r"<dialog[^>]* open.*?</dialog>", seen, flags=re.DOTALL).group()
        machine = json.loads((RESULTS / "baselines" / "provenance.json").read_text())["machines"][0]
        assert machine["git"]["commit"] in shown
        assert f"torch {machine['packages']['torch']}" in shown
        assert "31.50744" in shown

    def test_names_do_not_act(self, tmp_path):
        write_folder(tmp_path / "one", model=EVIL, method=EVIL, title=EVIL)
        seen = browse(browser, build.render(tmp_path), tmp_path, "#all")
        assert "<img" not in re.sub(r"<script.*?</script>", "", seen, flags=re.DOTALL)
        assert "&lt;img src=x" in seen

    def test_screenshot(self, page, tmp_path):
        picture = tmp_path / "page.png"
        browse(browser, page, tmp_path, "", f"--screenshot={picture}", "--window-size=1280,900")
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 20_000
