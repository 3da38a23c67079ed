"""Every backend against the reference, over drawn cases: all rows of all tables, all forms of all arguments."""

import pytest
from cases import assert_agrees, cases
from conftest import EXAMPLES, GPU, device_of
from hypothesis import given, settings

# Parts run in parallel; each draws its own cases.
PARTS = {"cpu": 8, "cuda": 2, "triton": 4}


def _property(name: str, part: int):
    @pytest.mark.parametrize("backend", [name], indirect=True)
    @given(case=cases())
    def test(backend, case):
        assert_agrees(case, backend, device_of(backend))

    test.__name__ = test.__qualname__ = f"test_{name}_{part}"
    # derandomize seeds by the test's identity; the part is in it.
    test.hypothesis.inner_test.__qualname__ = test.__qualname__
    return test


def pytest_generate_tests(metafunc):
    pass


for _name, _parts in PARTS.items():
    for _part in range(_parts):
        globals()[f"test_{_name}_{_part}"] = _property(_name, _part)


@pytest.fixture(autouse=True)
def examples(request):
    yield
