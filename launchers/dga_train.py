"""Adapt a pretrained language model to a domain: ``deepspeed launchers/dga_train.py --help``."""

from dga_scale.train.cli import train_command

if __name__ == "__main__":
    train_command()
