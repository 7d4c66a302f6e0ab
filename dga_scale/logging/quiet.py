"""Filters for library noise that a user can do nothing about, each with the reason."""

import logging
import re
import warnings

_LOG_LINES = (
    # logger, start of the message, why nobody can act on it
    ("DeepSpeed", r"Setting accelerator to CPU", "a machine without a GPU is a choice, not a fault"),
    ("DeepSpeed", r"Unable to find hostfile", "one machine needs none"),
    ("DeepSpeed", r"\*+$", "the frame around DeepSpeed's note on OMP_NUM_THREADS"),
    ("transformers.modeling_utils", r".*LOAD REPORT", "dga_scale says itself which weights are missing"),
)
_WARNINGS = (
    # start of the message, why nobody can act on it
    (r"`torch\.distributed\.\w+` is deprecated", "DeepSpeed's calls, not ours"),
    (
        r"torch\.distributed\.nn\.functional\.all_gather is deprecated",
        "older torch, which we take, has no other",
    ),
)


def quiet_libraries() -> None:
    """Drop the log lines and warnings named in this file; everything else is heard.

    Call it before DeepSpeed and transformers are imported: some lines come from the import itself.
    """
    for name in {logger for logger, _, _ in _LOG_LINES}:
        patterns = [re.compile(pattern) for logger, pattern, _ in _LOG_LINES if logger == name]
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Drop) for known in logger.filters):
            logger.addFilter(_Drop(patterns))
    for pattern, _ in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)


class _Drop(logging.Filter):
    """A filter that passes every record that begins with none of the patterns."""

    def __init__(self, patterns: list[re.Pattern[str]]) -> None:
        super().__init__()
        self._patterns = patterns

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(pattern.match(message) for pattern in self._patterns)
