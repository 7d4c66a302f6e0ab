"""Tokenise raw text into a corpus folder; see ``--help``."""

from dga_scale.corpus.cli import shard_command

if __name__ == "__main__":
    shard_command()
