"""SLURM jobs, checked and submitted: ``python tools/submit.py --help``."""

from dga_scale.slurm.cli import submit_command

if __name__ == "__main__":
    submit_command()
