"""PEP 517 backend: setuptools, plus torch as a build requirement only where the target environment has none.

pip's build isolation hides the environment's packages from ``sys.path`` but not from disk: if torch's headers lie in
the environment's site-packages, the build uses those and nothing is downloaded.
"""

import os
import sys

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

sys.path.insert(0, os.getcwd())  # setup.py's helpers live beside this file
import torch_paths


def _requires() -> list[str]:
    if torch_paths.find() or not torch_paths.native_wanted():
        return []
    return ["torch==2.13.0"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requires()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requires()
