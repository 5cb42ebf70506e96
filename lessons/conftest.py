"""The table of lessons, printed when they have run, in however many processes."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each lesson that ran and passed."""
    passed = [report.user_properties for report in terminalreporter.stats.get("passed", [])]
    tables = sorted(properties for properties in passed if properties)
    header = [[column for column, _ in properties] for properties in tables[:1]]
    for name, *values in [*header, *([value for _, value in row] for row in tables)]:
        numbers = "".join(f"{value!s:>12}" for value in values)
        terminalreporter.write_line(f"{name:24}{numbers}")
