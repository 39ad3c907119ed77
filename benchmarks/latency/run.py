"""Times everything that a suite names on this machine: models, then matrices; raw values and provenance are kept."""

from __future__ import annotations

import gc
from itertools import product
from pathlib import Path

import torch

from resting.benchmarks import provenance
from resting.benchmarks.assets import wikitext2
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.latency import decode_rows, matrices, quantised_matrices, timed_model, timing
from resting.benchmarks.latency.cpu_timer import CpuTimer
from resting.benchmarks.latency.decode import DENSE_PATHS
from resting.benchmarks.latency.decode_rows import Timer
from resting.benchmarks.latency.record import Record, Row
from resting.benchmarks.latency.setting import Setting
from resting.benchmarks.latency.timed_model import TimedModel
from resting.benchmarks.names import of_device, with_weights
from resting.benchmarks.progress import Console
from resting.sparsifier.quantised.formats import AS_IS


class LatencyRun:
    """Times a suite on one device, and keeps what is measured when it is stopped.

    Parameters
    ----------
    suite : Suite
    options : Options
    console : Console

    Attributes
    ----------
    record : Record
        What was measured so far, and its folder.

    Raises
    ------
    SuiteError
        If the suite times nothing on the device.
    """

    def __init__(self, suite: Suite, options: Options, console: Console) -> None:
        self._setting = Setting.of(suite, options, console)
        self._named: dict[str, str] = {}
        if (index := torch.device(options.device).index) is not None and self._on_gpu:
            torch.cuda.set_device(index)  # `cuda` alone is the current one
        wikitext2.provide(options.texts)
        timed_model.check_groups(self._setting)
        self.record = self._begin(options.output)

    def run(self) -> Path:
        """Time models and matrices with every number of threads; rows are saved as they come.

        Returns
        -------
        Path
            The folder.
        """
        before = torch.get_num_threads()
        table = self._setting.on_device
        try:
            for threads in table.threads:
                torch.set_num_threads(threads)
                for spec in table.models:
                    for dtype, weights in product(table.dtypes, self._setting.suite.weights):
                        self._time_model(spec, dtype, threads, weights)
                        gc.collect()  # graphs of a GPU hold memory, and are held in circles
                self._time_matrices(threads)
        finally:
            torch.set_num_threads(before)
            self._setting.console.end()
            if self.record.has_rows:
                self.record.save()
        return self.record.folder

    @property
    def _on_gpu(self) -> bool:
        return self._setting.device != "cpu"

    def _begin(self, output: Path) -> Record:
        suite, device = self._setting.suite, self._setting.device
        facts: Row = {"suite": suite.model_dump(), "dense_paths": {}, "measured_on": provenance.collect(device)}
        if not self._on_gpu:
            return Record(output / suite.name, facts)
        facts["copy_bandwidth"] = timing.copy_bandwidth(device)
        facts["launches"], facts["kernels"] = {}, {}
        return Record(output / f"{suite.name}-{of_device(torch.cuda.get_device_name(device))}", facts)

    def _time_matrices(self, threads: int) -> None:
        setting, table = self._setting, self._setting.on_device
        self._forget_choices()
        for i, text in enumerate(table.matrices):
            for dtype in table.dtypes:
                setting.console.begin(i, len(table.matrices), f"{text}, {dtype}")
                matrix = matrices.Matrix.parse(text)
                found, raw = matrices.measure(matrix, getattr(torch, dtype), table.sparsities, threads, setting.device)
                self.record.matrices += [
                    row | {"threads": threads, "raw": [round(s, 9) for s in seconds]}
                    for row, seconds in zip(found, raw.values())
                ]
                self._note_choices("matrices")
                self.record.save()
                for form in setting.suite.weights:
                    if form != AS_IS:
                        self._time_codes(matrix, dtype, form, threads)

    def _time_codes(self, matrix: matrices.Matrix, dtype: str, form: str, threads: int) -> None:
        """Time products of a matrix from codes; a reason where no kernel is timed."""
        about = {"matrix": str(matrix), "dtype": dtype, "weights": form, "threads": threads}
        if self._on_gpu:
            self.record.quantised.append(about | {"reason": "products from codes are timed on a CPU by this suite"})
            return
        sparsities = self._setting.on_device.sparsities
        found, raw = quantised_matrices.measure(matrix, getattr(torch, dtype), form, sparsities, threads)
        values = [[round(s, 9) for s in seconds] for seconds in raw.values()] or [[]]
        self.record.quantised += [about | row | {"raw": seconds} for row, seconds in zip(found, values)]
        self.record.save()

    def _time_model(self, spec: str, dtype: str, threads: int, weights: str) -> None:
        """Time all cells of one model, its weights stored in a format: one row per cell."""
        setting = self._setting
        self._forget_choices()
        model = timed_model.load(spec, dtype, setting, weights)
        part = f"{spec}, {dtype}" if weights == AS_IS else f"{spec}, {dtype}, {weights}"
        if self._named.setdefault(model.name, spec) != spec:  # another model has the name
            model.name = with_weights(model.name, model.weights)
        setting.console.begin(0, 1, f"{model.name}, {dtype}: dense paths")
        timer = self._timer(model, threads)
        self.record.facts["dense_paths"][f"{part}, {threads} threads"] = {
            "fastest": timer.path,
            "seconds": timer.tried,
            "fastest_generate": timer.generate_path,
            "generate_seconds": timer.generate_tried,
        }
        cells = setting.sparse_cells
        for i, cell in enumerate(cells):
            setting.console.begin(i, len(cells), f"{model.name}, {dtype}: {cell.label} at {cell.target:g}")
            about = {
                "model": model.name,
                "weights": model.weights,
                "dtype": dtype,
                "threads": threads,
                "method": cell.label,
                "target": cell.target,
                "dense_path": timer.path,
                "generate_path": timer.generate_path,
            }
            row = about | decode_rows.measured(model, timer, cell)
            setting.console.say(decode_rows.shown(row))
            self.record.decode.append(row)
            self._note_choices(part)
            self.record.save()

    def _timer(self, model: TimedModel, threads: int) -> Timer:
        config, paths = self._setting.config, self._setting.on_device.dense_paths
        if not self._on_gpu:
            return CpuTimer(model, config.prompt, threads, paths or DENSE_PATHS, config.generate)
        from resting.benchmarks.latency.gpu.timer import GpuTimer

        return GpuTimer(model, config.prompt, paths, config.generate)

    def _note_choices(self, part: str) -> None:
        """Write down which layouts, tiles and forms a part of the run was timed with until now."""
        if self._on_gpu:
            from resting.sparsifier.decoding import cuda_layouts
            from resting.sparsifier.decoding.cuda import choice

            tiles = {f"compiled {what}": list(found) for what, found in choice.CHOSEN.items()}
            self.record.facts["launches"][part] = dict(cuda_layouts.CHOSEN) | tiles
            self.record.facts["kernels"][part] = dict(choice.FORMS)

    def _forget_choices(self) -> None:
        """Let the next part of the run choose its own."""
        if self._on_gpu:
            from resting.sparsifier.decoding import cuda_layouts
            from resting.sparsifier.decoding.cuda import choice

            for chosen in (cuda_layouts.CHOSEN, choice.CHOSEN, choice.FORMS):
                chosen.clear()
