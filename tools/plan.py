"""Memory, traffic and time of a run before it is paid for: ``python tools/plan.py --help``."""

from dga_scale.planning.cli import plan_command

if __name__ == "__main__":
    plan_command()
