"""rich, where it is not installed: pip's own copy of it."""

import contextlib
import importlib
import sys

# which refuses to be imported after pip
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

for _part in ("console", "table", "progress", "markup", "text"):
    sys.modules[f"rich.{_part}"] = importlib.import_module(f"pip._vendor.rich.{_part}")
