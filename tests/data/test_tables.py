"""Tables, and what in them is unknown."""

import re

import pytest
from helpers import refusal

from fedhelp_jax.data.readers.tables import group_of, is_unknown, read_table

UNKNOWN = ("", "  ", "nan", "NaN", "NA", "N/A", "None", "null", "<NA>", "#N/A", " nan ", "unknown")


@pytest.mark.parametrize("value", UNKNOWN)
def test_an_unknown_group_is_of_one_example(value):
    assert is_unknown(value)
    assert [group_of(value, name) for name in "ab"] == ["image a", "image b"]


@pytest.mark.parametrize("value", ["0", "-1", "HAM_1", "nano", "Nancy", "no", "null_7"])
def test_what_is_known(value):
    assert not is_unknown(value)
    assert group_of(f" {value} ", "a") == value


@pytest.mark.parametrize("separator", [",", ", ", " ,  ", "\t"])
def test_values_have_no_blanks_around_them(separator):
    lines = [["id", "name", "note"], ["1", "x y", '"a, b"'], ["2", "", ""], [""], ["3"]]
    text = "\ufeff" + "\r\n".join(separator.join(line) for line in lines)
    columns, rows = read_table(text.encode(), ("key|id", "name"), "t.csv")
    assert columns == ["id", "name", "note"]
    assert rows == [
        {"id": "1", "name": "x y", "note": "a, b", "key": "1"},
        {"id": "2", "name": "", "note": "", "key": "2"},
        {"id": "3", "name": "", "note": "", "key": "3"},
    ]


def test_blank_values_at_the_end_of_lines_are_no_columns():
    columns, rows = read_table(b"id,name,,\n1,x,,\n", ("id",), "t.csv")
    assert columns == ["id", "name"] and rows == [{"id": "1", "name": "x"}]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe", "cannot be read as a CSV file"),
        (b"", "has no column id; it has none"),
        (b"key,name\n1,2\n", "has no column id; it has key, name"),
        (b"id,name\n", "has no rows"),
        (b"id,name,id\n1,2,3\n", "has 2 columns called 'id'"),
        (b"id,name\n1,x\n2,x,y\n", "line 3 has 3 values, but there are 2 columns"),
    ],
)
def test_what_is_no_such_table_is_refused(data, words):
    line = refusal(lambda: read_table(data, ("id",), "data.table: t.csv"))
    assert re.match(f"data.table: t.csv {words}", line), line
