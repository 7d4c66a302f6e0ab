"""Models against their base, on held-out text and end tasks: ``python tools/evaluate.py --help``."""

from dga_scale.endtasks.evaluate_cli import evaluate_command

if __name__ == "__main__":
    evaluate_command()
