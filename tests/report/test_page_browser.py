"""The page of all results, in a browser: what it shows, and how it is used."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil

import pandas as pd
import pytest
from page_folder import EVIL, RESULTS, browse, find_browser, read, write_folder

from resting.benchmarks.page import build

browser = find_browser()


@pytest.mark.skipif(browser is None, reason="no Chromium on this machine: chromium, chromium-browser or google-chrome")
class TestBrowser:
    def test_first_screen_answers_five_questions(self, page, data, tmp_path):
        """docs/read-the-page.md names these places."""
        seen = browse(browser, page, tmp_path, "#speed=1.2")
        text = {
            name: html.unescape(re.sub(r"<svg.*?</svg>|<[^>]+>", "", found)).replace("\u00a0", " ")
            for name, found in re.findall(r'id="(answer-\w+)">(.*?)</(?:p|code)>', seen, flags=re.DOTALL)
        }
        board = data["boards"][0]
        at = [point for point in board["points"] if point[1] >= 0.5 and "," not in point[0]]
        best = min(at, key=lambda point: point[3])
        assert f"{best[0]} loses {best[3]:.3f} nats/token, reading {100 * (1 - best[2]):.0f} %" in text["answer-bytes"]
        timed = {(p[0], p[1]): p[2] for p in data["timed"][board["timed"][0]]["points"]}
        fast = [point for point in board["points"] if timed.get((point[0], point[1]), 0.0) >= 1.2]
        best = min(fast, key=lambda point: point[3])
        assert f"{best[0]} loses {best[3]:.3f}" in text["answer-speed"]
        both = {point[0]: point[3] for point in at if point[0] in ("teal", "spon(teal)") and point[1] == 0.5}
        for nats in both.values() if len(both) == 2 else ():
            assert f"{nats:.3f}" in text["answer-spon"]
        assert text["answer-spon"].endswith(".")
        assert board["model"] in text["answer-where"]
        assert text["answer-run"].startswith("resting fit --model")

    def test_a_bound_is_shown_and_is_not_the_best(self, tmp_path):
        """Of a folder whose best method is called the oracle."""
        folder = shutil.copytree(RESULTS / "baselines-wide", tmp_path / "results" / "wide")
        for name in ("results.csv", "provenance.json"):
            (folder / name).write_text((folder / name).read_text().replace("teal-greedy", "oracle"))
        windows = pd.read_parquet(folder / "windows.parquet")
        windows.replace({"method": {"teal-greedy": "oracle"}}).to_parquet(folder / "windows.parquet")
        seen = browse(browser, build.render(tmp_path / "results"), tmp_path, "#bytes=0.5")
        table = re.search(r'<table id="best".*?</table>', seen, flags=re.DOTALL).group()
        first, second = re.findall(r"<tr data-method=.*?</tr>", table, flags=re.DOTALL)[:2]
        assert "oracle (a bound)" in first
        assert " best" not in first
        assert " best" in second
        best = re.match(r'<tr data-method="([^"]+)"', second).group(1)
        assert best in re.search(r'id="answer-bytes">.*?</p>', seen, flags=re.DOTALL).group()
        assert "oracle" not in re.search(r'id="answer-run">.*?</code>', seen, flags=re.DOTALL).group()

    def test_first_table_has_every_method_and_the_right_best(self, page, data, tmp_path):
        seen = browse(browser, page, tmp_path, "#bytes=0.4&nats=0.3")
        table = re.search(r'<table id="best".*?</table>', seen, flags=re.DOTALL).group()
        shown = re.findall(r'<tr data-method="([^"]+)"', table)
        board = data["boards"][0]
        assert set(shown) == {point[0] for point in board["points"] if "," not in point[0]}
        best = min((p for p in board["points"] if p[1] >= 0.4 and "," not in p[0]), key=lambda p: p[3])
        assert shown[0] == best[0]
        assert "(nats/token)" in table
        points = sum(point[3] <= data["ceiling"] and "," not in point[0] for point in board["points"])
        chart = re.search(r'id="chart-bytes".*?</svg></div>', seen, flags=re.DOTALL).group()
        assert chart.count('class="point"') == points

    def test_first_view(self, page, tmp_path):
        seen = browse(browser, page, tmp_path)
        table = seen[seen.index('id="table"') :]
        shown = dict(re.findall(r'<tr data-method="([^"]+)"[^>]*>.*?<button[^>]*>([\d.]+)', table))
        assert shown["teal"] == "31.51"
        assert shown["dense"] == "30.09"

    def test_hash_filters(self, page, tmp_path):
        seen = browse(browser, page, tmp_path, "#method=teal&method=wina")
        assert set(re.findall(r'<tr data-method="([^"]+)"', seen)) == {"teal", "wina", "dense"}
        seen = browse(browser, page, tmp_path, "#suite=tasks&metric=piqa%2Facc&q=wina,chess")
        table = seen[seen.index('id="table"') :]
        assert set(re.findall(r'<tr data-method="([^"]+)"', table)) == {"wina", "chess", "chess-attention"}

    def test_sorting_by_hash(self, page, tmp_path):
        address = "#suite=baselines&metric=wikitext2_perplexity&tokens=all-but-first-1&sort=0.25&order=down"
        seen = browse(browser, page, tmp_path, address)
        table = seen[seen.index('id="table"') :]
        found = [float(v) for v in re.findall(r"<tr data-method=[^>]*>.*?<button[^>]*>([\d.]+)", table)]
        assert found == sorted(found, reverse=True)
        assert len(re.findall('aria-sort="descending"', table)) == 1

    def test_study(self, page, tmp_path):
        seen = browse(browser, page, tmp_path, "#suite=method/spon-prune-pruning&method=teal")
        shown = re.search(r'<details open=""><summary>method.*?</details>', seen, flags=re.DOTALL).group()
        lines = [line for line in read(RESULTS / "method/spon-prune-pruning/results.csv") if line["method"] == "teal"]
        assert shown.count("<tr>") == len(lines) + 1

    def test_number_opens_where_it_comes_from(self, page, tmp_path):
        press = """<script>document.querySelector('#table tr[data-method="teal"] .number').click()</script>"""
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

    def test_a_number_of_the_first_table_opens_all_that_it_is_made_of(self, page, data, tmp_path):
        press = """<script>document.querySelector('#best tr[data-method="teal"] .number').click()</script>"""
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace(
            "</body>", f"{press}</body>"
        )
        seen = browse(browser, page, tmp_path)
        shown = re.search(r"<dialog[^>]* open.*?</dialog>", seen, flags=re.DOTALL).group()
        board = data["boards"][0]
        for text in board["texts"]:
            assert f"<h3>{text} perplexity" in shown
        folder = next(point[-1] for point in board["points"] if point[0] == "teal")
        assert f"{data['folders'][folder]['name']}/results.csv" in shown
        assert "latency/decode.csv" in shown

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

    def test_search_leaves_numbers_beside_their_methods(self, page, tmp_path):
        """Whatever differs stands below the method, and so the second cell of a line is a number's."""
        seen = browse(browser, page, tmp_path, "#q=teal")
        table = seen[seen.index('id="table"') : seen.index('id="more"')]
        assert 'class="below"' in table
        for line in re.findall(r'<tr data-method="[^"]+"><th.*?</th>(<td.*?)</tr>', table):
            assert line.startswith('<td class="n')

    def test_csv_and_latex(self, page, tmp_path):
        ask = """<script>
        const pre = (t) => Object.assign(document.createElement("pre"), { className: "saved", textContent: t });
        const keep = (t) => document.body.append(pre(t));
        URL.createObjectURL = (blob) => (blob.text().then(keep), "#");
        HTMLAnchorElement.prototype.click = () => {};
        for (const button of document.querySelectorAll("#table-tools > button")) button.click();
        </script>"""
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", f"{ask}</body>")
        seen = browse(browser, page, tmp_path)
        found = re.findall(r'<pre class="saved">(.*?)</pre>', seen, flags=re.DOTALL)
        csv_text, latex = map(html.unescape, found)
        lines = list(csv.DictReader(csv_text.splitlines()))
        assert {line["Method"]: line["target 0.25"] for line in lines}["teal"] == "31.51"
        assert rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}" in latex
        assert latex.count(" \\\\") == len(lines) + 1

    def test_a_narrow_page_does_not_scroll_sideways(self, page, tmp_path):
        ask = """<script>
        const root = document.documentElement;
        root.dataset.wide = root.scrollWidth - root.clientWidth;
        </script>"""
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", f"{ask}</body>")
        seen = browse(browser, page, tmp_path, "#all", "--dump-dom", "--window-size=500,900")
        assert 'data-wide="0"' in seen

    def test_everything_that_acts_has_a_name(self, page, tmp_path):
        ask = """<script>
        const all = [...document.querySelectorAll("button, select, input, a, summary, [tabindex='0']")];
        const named = (e) => e.getAttribute("aria-label") || e.getAttribute("aria-labelledby");
        const labelled = (e) => named(e) || e.labels?.length;
        const bad = all.filter((e) => !e.closest("[hidden]") && !e.textContent.trim() && !labelled(e));
        document.documentElement.dataset.nameless = bad.map((e) => e.outerHTML.slice(0, 60)).join(" ");
        </script>"""
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", f"{ask}</body>")
        assert 'data-nameless=""' in browse(browser, page, tmp_path)
