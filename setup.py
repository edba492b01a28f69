"""Adds the tables and searches, which users edit in `sweeps/`, to the installed package; all else is in pyproject.toml.

`cast_ray.plan.yaml_files.shipped_folder` finds them in a checkout and in an installed package.
"""

from setuptools import find_packages, setup

SHIPPED = {"cast_ray.tables": "sweeps/tables", "cast_ray.searches": "sweeps/search"}

setup(
    packages=[*find_packages(include=["cast_ray", "cast_ray.*"]), *SHIPPED],
    package_dir=SHIPPED,
)
