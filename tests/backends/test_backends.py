"""Every method passes every conformance check."""

from __future__ import annotations

import pytest

from embcomp.backends import BACKENDS
from embcomp.testing import CHECKS
from tests.helpers.backends_under_test import CASES


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_conforms(case, check):
    CHECKS[check](CASES[case])


def test_every_method_is_under_test():
    assert {case.config.name for case in CASES.values()} == set(BACKENDS)
