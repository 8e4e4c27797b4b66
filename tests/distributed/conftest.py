"""What holds for every test of this folder: time enough on a busy machine, and no process left behind."""

import os
import uuid

import pytest
from launch import MARK, end_all, living


def pytest_collection_modifyitems(items):
    for item in items:
        if "distributed" in item.path.parts and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left_behind():
    """Whatever a module starts inherits a mark; at the module's end nothing that lives may bear it."""
    os.environ[MARK] = uuid.uuid4().hex
    yield
    left = living(os.environ.pop(MARK))
    commands = end_all(left)
    assert not commands, commands
