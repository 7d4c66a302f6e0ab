"""Gradient consistency of corpora: ``python tools/gradient_consistency.py --help``."""

from dga_scale.report.consistency import consistency_command

if __name__ == "__main__":
    consistency_command()
