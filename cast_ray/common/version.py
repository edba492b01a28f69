"""The version of the package, as `pyproject.toml` reads it and as results and saved models name it."""

VERSION = "0.1.0"
