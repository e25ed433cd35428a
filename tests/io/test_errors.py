"""What libraries say, quoted in one line."""

from __future__ import annotations

import pytest

from embcomp.errors import one_line


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        ("Couldn't read:\n  invalid type\n", "Couldn't read: invalid type"),
        ("no such column.", "no such column"),
        ("", "ValueError"),
        ("x" * 1000, "x" * 300 + "..."),
    ],
)
def test_an_error_is_quoted_in_one_short_line(said, quoted):
    assert one_line(ValueError(said)) == quoted
