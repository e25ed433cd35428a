"""`import embcomp` is light, and every public name is there when it is asked for."""

from __future__ import annotations

import inspect

import pytest

import embcomp


@pytest.mark.parametrize("name", embcomp.__all__)
def test_public_name_resolves_once_and_is_documented(name):
    value = inspect.getattr_static(embcomp, name, None) or embcomp.__getattr__(name)
    assert vars(embcomp)[name] is value
    assert inspect.getdoc(value)


def test_names_and_their_homes_agree():
    assert set(embcomp._HOMES) == set(embcomp.__all__)
    assert set(embcomp.__all__) <= set(dir(embcomp))


def test_unknown_name_is_an_attribute_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match="has no attribute 'Uniified'; it has .*'Unified'"):
        _ = embcomp.Uniified
