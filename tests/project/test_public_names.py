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


def test_a_public_name_of_old_goes_on_working_and_says_what_it_is_called_now():
    import embcomp.search

    with pytest.warns(DeprecationWarning, match="Source is called CandidateSampler now"):
        assert embcomp.search.Source is embcomp.search.CandidateSampler
