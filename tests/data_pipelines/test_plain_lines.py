"""Blocks of lines are the same frames however they are read: compiled, by polars, or line by line."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import example, given, settings, strategies as st

from embcomp.data_pipelines.importers import plain_lines
from embcomp.data_pipelines.importers.delimited import ColumnType, Delimited
from embcomp.data_pipelines.importers.plain_lines import read_plain_lines
from embcomp.data_pipelines.numbering import Numbering

COLUMNS: tuple[tuple[str, ColumnType], ...] = (
    ("label", "int"),
    ("count", "whole"),
    ("price", "float"),
    ("user", "text"),
    ("tag", "text"),
)
TABS = Delimited(columns=COLUMNS, separator="\t")
CSV = Delimited(columns=COLUMNS, separator=",", quote='"', null_values=("NA",))
SCHEMA = [("n", "int"), ("x", "float"), ("t", "text")]

SOUND = (
    st.integers(-(10**18) + 1, 10**18 - 1).map(str),
    st.integers(-3, 300).map(str),
    st.decimals(-(10**6), 10**6, places=4).map(str),
    st.text("0123456789abcdef", min_size=8, max_size=8),
    st.just(""),
)
HOSTILE = (
    st.sampled_from(
        [
            "-",
            "-0",
            "007",
            "+5",
            " 7",
            "7 ",
            "1e3",
            ".5",
            "5.",
            "-.5",
            "1_000",
            "0x1f",
            "nan",
            "inf",
        ]
        + ["-1.50", "1,5", "9223372036854775807", "9223372036854775808", "1" * 19, "1" * 40, "NA"]
        + [
            "True",
            "false",
            '"',
            '""',
            '"a"',
            'a"b',
            "'",
            "\\N",
            "null",
            "\x00",
            "\x0b",
            "é",
            "\u2028",
        ]
        + ["123456789012", "1234567890123", "0.1234567890123456", "-123456789.123456", "\ufeff"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=20),
)


def lines(separator: str, last: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Blocks of mostly sound lines: few fields too many, few odd bytes, an end with or without newline."""
    fields = st.lists(st.one_of(*SOUND, *SOUND, last), min_size=5, max_size=5)
    odd = st.lists(st.one_of(*SOUND, last), max_size=8)
    line = st.one_of(fields, fields, fields, odd).map(separator.join).map(str.encode)
    broken = st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b""))
    ends = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n"])
    rows = st.lists(st.tuples(st.one_of(line, line, line, broken), ends), min_size=1, max_size=6)
    sound = st.lists(st.one_of(*SOUND), min_size=5, max_size=5).map(separator.join).map(str.encode)
    nearly = st.lists(st.tuples(st.one_of(*[sound] * 9, line), ends), min_size=1, max_size=6)
    whole = st.one_of(rows, nearly).map(lambda found: b"".join(text + end for text, end in found))
    return st.one_of(whole, whole.map(lambda block: block.removesuffix(b"\n") or b"\n"))


def rows_of(block: bytes) -> int:
    return block.count(b"\n") + (not block.endswith(b"\n"))


def bits(frame: pl.DataFrame) -> list[tuple[str, pl.DataType, list[object]]]:
    """A frame's columns and values; of numbers as texts, in which -0.0 is not 0.0 and NaN is NaN."""
    return [
        (name, frame.schema[name], [repr(each) for each in frame[name].to_list()])
        for name in frame.columns
    ]


def check(form: Delimited, block: bytes) -> None:
    """All three readers agree about every row, and about what is wrong with the others."""
    rows = rows_of(block)
    found = form.parse(block, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_lines, "_library", lambda: None)
        by_polars = form.parse(block, rows)
        patch.setattr(Delimited, "_is_plain", lambda *_: False)
        patch.setattr(Delimited, "_is_soundly_quoted", lambda *_: False)
        careful = form.parse(block, rows)
    for other in (by_polars, careful):
        assert bits(found.frame) == bits(other.frame)
        assert found.bad == other.bad
        mine, theirs = (range(rows) if p.positions is None else p.positions for p in (found, other))
        assert list(mine) == list(theirs)


@settings(max_examples=120, deadline=None)
@given(lines("\t", st.one_of(*HOSTILE)))
@example(b"1\t-0\t-0\ta\t\n")
@example(b"1\t2\t3\ta\tb\r\n1\t2\t3\ta\tb\r\n")
@example(b"1\t2\t3\ta\tb\r\n1\t2\t3\ta\tb\n")
@example(b"1\t\t\t\t")
@example(b"\t\t\t\t\n\t\t\t\t\n")
@example(b"1\t2\t3.5\ttwelve bytes\tthirteen more\n")
@example(b"1\t2\t3\t4\n5\n6\t7\n")
@example(b"1\t2\t3\t4\t5\n\n1\t2\t3\t4\t5\n")
def test_tab_separated_lines_are_read_alike(block):
    check(TABS, block)


@settings(max_examples=60, deadline=None)
@given(lines(",", st.one_of(*HOSTILE).map(lambda field: field.replace('"', ""))))
def test_lines_with_null_values_are_read_alike(block):
    check(CSV, block)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(-(10**18) + 1, 10**18 - 1)),
            st.one_of(st.none(), st.decimals(-(10**9), 10**9, places=3)),
            st.one_of(st.none(), st.text("ab c-.0", min_size=1, max_size=30)),
        ),
        min_size=1,
        max_size=40,
    ),
    st.booleans(),
)
def test_plain_lines_are_read_by_compiled_code(rows, ends):
    if plain_lines._library() is None:
        pytest.skip("no compiler")
    text = "\n".join(",".join("" if f is None else str(f) for f in row) for row in rows)
    block = (text + "\n" * ends).encode()
    frame = read_plain_lines(block, len(rows), SCHEMA, ",", {})
    if not ends and not text:
        return
    assert frame is not None
    columns = list(zip(*rows))
    assert frame["n"].to_list() == list(columns[0])
    assert frame["x"].to_list() == [None if x is None else float(x) for x in columns[1]]
    assert frame["t"].to_list() == list(columns[2])
    del block
    assert frame["t"].to_list() == list(columns[2])


@pytest.mark.parametrize("rows", [63, 64, 65, 300])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_lines_are_read_whole_wherever_they_fall(rows, end):
    """Fields of all lengths, so that lines begin at every place of what is read at a time."""
    if plain_lines._library() is None:
        pytest.skip("no compiler")
    values = [(7**n % 10 ** (n % 18 + 1), n / 8, "x" * (n % 15) or None) for n in range(rows)]
    block = b"\n".join(f"{n},{x},{t or ''}".encode() for n, x, t in values) + end
    texts = Numbering()
    frame = read_plain_lines(block, rows, SCHEMA, ",", {"t": texts})
    assert frame is not None
    assert frame["n"].to_list() == [n for n, _, _ in values]
    assert frame["x"].to_list() == [x for _, x, _ in values]
    known = [None, *texts.values()[0].to_pylist()]
    assert [known[number] for number in frame["t"]] == [t for _, _, t in values]
    for odd in (b"1,2\n", b"1,2,3,4\n", b"1,2,\xff\n", b"1,2,3\r\n", b"1,-,3\n"):
        late = b"1,2,3\n" * rows + odd
        assert read_plain_lines(late, rows + 1, SCHEMA, ",", {}) is None
    assert read_plain_lines(block, rows - 1, SCHEMA, ",", {}) is None
    assert read_plain_lines(block, rows + 1, SCHEMA, ",", {}) is None


@pytest.mark.parametrize(
    "block",
    [
        b"1,2\n",
        b"1,2,3,4\n",
        b"1,2,\xc3\xa9\n",
        b"x,2,3\n",
        b"1,2,3\n1,2",
        b"1,2,3\n\n",
        b"1e5,2,3\n",
    ]
    + [
        b"1,1e5,3\n",
        b"1,.5,3\n",
        b"1,5.,3\n",
        b"1, 5,3\n",
        b"1111111111111111111,5,3\n",
        b"-,1,3\n",
    ]
    + [b"1,2,3\r\n", b"1,2,a\rb\n", b"1,1234567890123456,3\n", b"1,2,3\n4,5,6\n7,8,9\n"],
)
def test_what_is_not_plain_is_left_to_others(block):
    rows = 2 if block.count(b"\n") > 1 else 1
    assert read_plain_lines(block, rows, SCHEMA, ",", {}) is None
