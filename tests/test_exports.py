"""``__all__`` is the truth: each name in it exists, and what looks public is in it."""

from __future__ import annotations

import importlib
import pkgutil
import types

import pytest


def module_names() -> list[str]:
    names = []
    for root in ("hbone", "hbone_cli"):
        package = importlib.import_module(root)
        names.append(root)
        names.extend(info.name for info in pkgutil.walk_packages(package.__path__, f"{root}."))
    return [name for name in names if not name.endswith(".__main__")]


MODULES = module_names()
PUBLIC_MODULES = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_exists_and_is_named_once(name: str) -> None:
    module = importlib.import_module(name)
    assert [export for export in module.__all__ if not hasattr(module, export)] == []
    assert len(set(module.__all__)) == len(module.__all__)
    assert [export for export in module.__all__ if export.startswith("_") and not export.startswith("__")] == []


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_all_of_a_public_module_is_complete(name: str) -> None:
    """A package's ``__init__`` offers what it re-exports; a plain module what it defines."""
    module = importlib.import_module(name)
    is_package = hasattr(module, "__path__")
    looks_public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and not isinstance(value, types.ModuleType)
        and (getattr(value, "__module__", name) or "").startswith(name if is_package else f"{name}")
        and (isinstance(value, type | types.FunctionType))
    }
    assert looks_public - set(module.__all__) == set()


def test_facade_re_exports_every_error() -> None:
    hbone = importlib.import_module("hbone")
    errors = importlib.import_module("hbone.errors")
    assert set(errors.__all__) <= set(hbone.__all__)


def test_star_import_is_the_public_api() -> None:
    namespace: dict[str, object] = {}
    exec("from hbone import *", namespace)
    hbone = importlib.import_module("hbone")
    assert set(namespace) - {"__builtins__"} == set(hbone.__all__)
