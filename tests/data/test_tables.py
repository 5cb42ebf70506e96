"""Rows of a table that cannot be what their author meant are named, and not taken as they are."""

from nanovlm.data.tables import csv_rows
from nanovlm.errors import NanoVLMError

HEADER = "index\tquestion\tA\n"


def read(tmp_path, text: str) -> list:
    path = tmp_path / "table.tsv"
    path.write_text(text, "utf-8")
    return list(csv_rows(path))


def test_a_stray_quote_that_takes_rows_in_is_named(tmp_path):
    rows = HEADER + '1\t"which is larger?\tone\n2\twhat?\ttwo\n3\t"who"\tthree\n4\twhere?\tfour\n'
    (where, problem), *rest = read(tmp_path, rows)
    assert isinstance(problem, NanoVLMError)
    assert "a quote that opens 2 lines above closes here" in str(problem)
    assert where.endswith("table.tsv:4")
    assert [row["question"] for _, row in rest] == ["where?"]


def test_a_quoted_cell_of_several_lines_is_one_cell(tmp_path):
    (_, row), (_, second) = read(
        tmp_path, HEADER + '1\t"first line\nsecond ""line"""\tone\n2\t"a\tb"\ttwo\n'
    )
    assert row["question"] == 'first line\nsecond "line"'
    assert second["question"] == "a\tb"
