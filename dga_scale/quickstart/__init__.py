"""The built-in demo: a real model and real text from packages that pip installs."""

from dga_scale.quickstart.prepare import FOLDER, defaults

__all__ = ["FOLDER", "defaults"]
