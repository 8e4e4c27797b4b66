"""``when_imported``: called once, after the module's code, whoever imports it and when; imports never fail of it."""

import importlib
import inspect
import sys
import threading

import pytest

from hf_sai.imports import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a module of a new name and returns the name."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def make(source, name=None):
        name = name or f"late_module_{tmp_path.name.replace('-', '_')}_{len(names)}"
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        names.append(name)
        return name

    yield make
    for name in names:
        sys.modules.pop(name, None)


def test_it_is_called_after_the_modules_code_and_once(module):
    name, seen = module("value = 1\nvalue += 1\n"), []
    when_imported(name, lambda loaded: seen.append(loaded.value))
    assert seen == []
    importlib.import_module(name)
    importlib.import_module(name)
    assert seen == [2]


def test_it_is_called_at_once_where_the_module_is_there(module):
    seen = []
    when_imported("json", seen.append)
    assert [loaded.__name__ for loaded in seen] == ["json"]


def test_the_module_keeps_its_own_loader_and_source(module):
    name = module("def f():\n    return 1\n")
    when_imported(name, lambda loaded: None)
    loaded = importlib.import_module(name)
    assert type(loaded.__loader__).__name__ == "SourceFileLoader"
    assert loaded.__spec__.loader is loaded.__loader__
    assert inspect.getsource(loaded.f).startswith("def f")


def test_a_call_that_fails_costs_a_warning_and_no_import(module, caplog):
    name, seen = module("value = 1\n"), []
    when_imported(name, lambda loaded: loaded.no_such_name)
    when_imported(name, seen.append)
    assert importlib.import_module(name).value == 1
    assert len(seen) == 1
    assert f"could not prepare {name}: AttributeError" in caplog.text


def test_a_module_that_fails_is_waited_for_again(module):
    name, seen = module("raise RuntimeError('half installed')\n"), []
    when_imported(name, seen.append)
    with pytest.raises(RuntimeError, match="half installed"):
        importlib.import_module(name)
    module("value = 'now it is whole'\n", name)
    importlib.import_module(name)
    assert len(seen) == 1


def test_a_module_that_another_thread_is_importing_is_not_missed(module):
    begun, go_on = threading.Event(), threading.Event()
    name, seen = module("import test_gate\ntest_gate.begun.set()\ntest_gate.go_on.wait(60)\nvalue = 1\n"), []
    gate = type(sys)("test_gate")
    gate.begun, gate.go_on = begun, go_on
    sys.modules["test_gate"] = gate
    try:
        importing = threading.Thread(target=importlib.import_module, args=(name,))
        importing.start()
        assert begun.wait(60)
        asking = threading.Thread(target=when_imported, args=(name, lambda loaded: seen.append(loaded.value)))
        asking.start()
        go_on.set()
        importing.join(60)
        asking.join(60)
        assert seen == [1]
    finally:
        del sys.modules["test_gate"]


def test_a_module_that_asks_for_itself_on_the_way_is_not_missed(module):
    name, seen = module("import test_gate\ntest_gate.ask(__name__)\nvalue = 1\n"), []
    gate = sys.modules["test_gate"] = type(sys)("test_gate")
    gate.ask = lambda name: when_imported(name, lambda loaded: seen.append(loaded.value))
    try:
        loaded = importlib.import_module(name)
        assert seen == [1]
        assert type(loaded.__spec__) is importlib.machinery.ModuleSpec
    finally:
        del sys.modules["test_gate"]
