"""The whole path on real text and a real model, in ./demo: ``make demo``, or ``python tools/demo.py``."""

from dga_scale.config.arguments import Parser
from dga_scale.errors import run_main


def main() -> int:
    Parser(description="Adapt a real model to real text and show what it gained and kept.").parse_args()
    from dga_scale.quickstart.demo import demo  # torch's import takes seconds

    return demo()


if __name__ == "__main__":
    run_main(main)
