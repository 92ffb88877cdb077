"""Settings for all tests."""

import os

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("datafiles")  # its asserts show their values, as those of the tests do

# No deadline: the first call of a torch function is slow. In CI the same examples are tried every time, so
# that a failure there is never luck; elsewhere they differ from run to run and find new cases.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
