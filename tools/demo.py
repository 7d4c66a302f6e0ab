"""The whole path on real text and a real model, in ./demo: ``make demo``, or ``python tools/demo.py``."""

from dga_scale.errors import run_main
from dga_scale.quickstart.demo import demo

if __name__ == "__main__":
    run_main(demo)
