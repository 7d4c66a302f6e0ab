"""What a run over several domains forgot: ``python tools/forgetting.py --help``."""

from dga_scale.endtasks.cli import forgetting_command

if __name__ == "__main__":
    forgetting_command()
