"""A run's checkpoint as a Hugging Face model folder: ``python tools/consolidate_checkpoint.py --help``."""

from dga_scale.train.cli import consolidate_command

if __name__ == "__main__":
    consolidate_command()
