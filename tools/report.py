"""One HTML page about one run or several: ``python tools/report.py RUN... --output report.html``."""

from dga_scale.report.cli import report_command

if __name__ == "__main__":
    report_command()
