"""Terms of a domain as tokens of a model: ``python tools/extend_vocabulary.py --help``."""

from dga_scale.vocabulary.cli import extend_vocabulary_command

if __name__ == "__main__":
    extend_vocabulary_command()
