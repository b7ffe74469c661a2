"""How close each comparison of a run came to its tolerance: printed at its end, and with ``--margins FILE`` written."""

import json
import os
import pathlib
from typing import NamedTuple

SHOWN = 10


class Margin(NamedTuple):
    """error / allowed of the closest number of one comparison."""

    margin: float
    test: str
    name: str


recorded: list[Margin] = []


def record(margin: float, name: str) -> None:
    test, _, _ = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")
    recorded.append(Margin(margin, test, name))


def pytest_addoption(parser) -> None:
    parser.addoption("--margins", metavar="FILE", help="write error / allowed of every comparison into FILE (JSON)")


def pytest_sessionfinish(session) -> None:
    """A worker of pytest-xdist hands its margins to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["margins"] = [list(margin) for margin in recorded]


class FromWorkers:
    """Registered where pytest-xdist is: its hooks are unknown elsewhere."""

    def pytest_testnodedown(self, node, error) -> None:
        recorded.extend(Margin(*margin) for margin in getattr(node, "workeroutput", {}).get("margins", ()))


def pytest_configure(config) -> None:
    if config.pluginmanager.hasplugin("dsession"):
        config.pluginmanager.register(FromWorkers())


def pytest_terminal_summary(terminalreporter, config) -> None:
    recorded.sort(reverse=True)
    if recorded:
        terminalreporter.section(f"the {min(SHOWN, len(recorded))} of {len(recorded)} comparisons closest to failing")
        for margin in recorded[:SHOWN]:
            terminalreporter.write_line(f"{margin.margin:.2f} of what is allowed: {margin.name}, {margin.test}")
    path = config.getoption("--margins")
    if path:
        rows = [{"margin": round(margin, 4), "name": name, "test": test} for margin, test, name in recorded]
        pathlib.Path(path).write_text(json.dumps(rows, indent=1) + "\n")
