"""Fine-tune a model on an end task with several seeds: ``python launchers/finetune.py --help``."""

from dga_scale.endtasks.cli import finetune_command

if __name__ == "__main__":
    finetune_command()
