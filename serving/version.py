"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    """As in pyproject.toml; "unknown" when the packages are used without being installed."""
    try:
        return metadata.version("onnxlate")
    except metadata.PackageNotFoundError:
        return "unknown"
