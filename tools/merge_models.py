"""Merge adapted models with their base, or compare coefficients: ``python tools/merge_models.py --help``."""

from dga_scale.merging.cli import merge_command

if __name__ == "__main__":
    merge_command()
