"""What a run of times works with, read once from the suite and the command line."""

from __future__ import annotations

from dataclasses import dataclass

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.expand import cells_of
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import LatencyConfig, LatencyDeviceConfig, Suite
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency import decode
from resting.benchmarks.latency.gpu.compiling import DENSE_PATHS
from resting.benchmarks.progress import Console
from resting.sparsifier import SparsifierError
from resting.sparsifier.decoding import cpu_quantised_layout, cuda_quantised_layout
from resting.sparsifier.quantised.formats import Format


def check_replaced(suite: Suite, model: str | None, dtype: str | None) -> None:
    """Refuse another model or dtype for a suite of times.

    Raises
    ------
    SuiteError
    """
    for option, value in (("--model", model), ("--dtype", dtype)):
        if suite.latency is not None and value is not None:
            raise SuiteError(f"{option} {value}: suite {suite.name} measures time, and names what it times itself")


def timed_on(suite: Suite, device: str) -> tuple[LatencyConfig, LatencyDeviceConfig]:
    """Return what `suite` times on a device.

    Raises
    ------
    SuiteError
        If it is nothing.
    """
    config = suite.latency
    sections: dict[str, LatencyDeviceConfig | None] = {} if config is None else {"cpu": config.cpu, "cuda": config.cuda}
    on_device = sections.get(device.split(":")[0])
    if config is None or on_device is None:
        allowed = " or ".join(f"--device {name}" for name, section in sections.items() if section is not None)
        raise SuiteError(f"suite {suite.name} has nothing to time on {device}; allowed: {allowed or 'nothing'}")
    return config, on_device


def check_formats(suite: Suite, table: LatencyDeviceConfig, device: str) -> None:
    """Refuse weight formats that decoding has no kernels for on a device.

    Raises
    ------
    SuiteError
    """
    for name in suite.weights:
        if (format := Format.parse(name)) is None:
            continue
        if format.compensated:
            plain = format.stored.name
            raise SuiteError(
                f"--weights {name}: suite {suite.name} measures time, which does not depend on how codes were found; "
                f"allowed: {plain}"
            )
        if device == "cpu" and not table.models:
            continue  # a matrix whose format has no kernel gets a reason of its own
        if format.head and device != "cpu":
            raise SuiteError(
                f"--weights {name}: a GPU reads the output layer as it is, and suite {suite.name} measures time; "
                f"allowed: {format._replace(head=False).name}"
            )
        try:
            (cpu_quantised_layout if device == "cpu" else cuda_quantised_layout).check(format)
        except SparsifierError as error:
            raise SuiteError(f"--weights {name}: {error}; suite {suite.name} measures time") from error


def check_paths(suite: Suite, table: LatencyDeviceConfig, device: str) -> None:
    """Refuse names of dense paths that a device does not have.

    Raises
    ------
    SuiteError
    """
    known = decode.DENSE_PATHS if device == "cpu" else tuple(DENSE_PATHS)
    for name in table.dense_paths:
        if name not in known:
            raise SuiteError(f"suite {suite.name}, dense_paths: there is no {name!r}; allowed: {', '.join(known)}")


@dataclass(frozen=True)
class Setting:
    """Holds a suite that measures time, its cells, and the device that they are timed on.

    Attributes
    ----------
    suite : Suite
    config : LatencyConfig
        The suite's section ``latency``.
    on_device : LatencyDeviceConfig
        What of it is timed on this kind of device.
    device : str
    cells : list of Cell
        All of the suite's, the dense one included.
    console : Console
    trusted : bool
        Whether the code that a model brings is run.
    """

    suite: Suite
    config: LatencyConfig
    on_device: LatencyDeviceConfig
    device: str
    cells: list[Cell]
    console: Console
    trusted: bool = False

    @classmethod
    def of(cls, suite: Suite, options: Options, console: Console) -> Setting:
        """Find what `suite` times on the device of `options`.

        Raises
        ------
        SuiteError
            If it times nothing there, is given another model or dtype, asks for weights in a format without kernels,
            or names an unknown method.
        """
        check_replaced(suite, options.model, options.dtype)
        device = options.device
        config, on_device = timed_on(suite, device)
        check_formats(suite, on_device, device)
        check_paths(suite, on_device, device)
        return cls(suite, config, on_device, device, cells_of(suite, options.methods), console, options.trusted)

    @property
    def sparse_cells(self) -> list[Cell]:
        """Cells that are timed against the dense model: all methods at the suite's first target, then at its next.

        So a run that is stopped has compared methods where the suite looks first.
        """
        place = {target: number for number, target in enumerate(self.suite.targets)}
        sparse = [cell for cell in self.cells if cell.config.name != "dense"]
        return sorted(sparse, key=lambda cell: place.get(cell.target, len(place)))
