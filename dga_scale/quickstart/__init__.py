"""The built-in demo: a real model and real text out of packages that pip installs, ready for a run."""

from dga_scale.quickstart.prepare import FOLDER, defaults

__all__ = ["FOLDER", "defaults"]
