"""Named lines are dropped, and nothing else."""

import logging
import warnings

import pytest

from dga_scale.logging.quiet import quiet_libraries


def test_only_named_lines_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    quiet_libraries()
    quiet_libraries()  # a second call changes nothing
    logger = logging.getLogger("DeepSpeed")
    assert len(logger.filters) == 1
    logger.propagate = True
    caplog.set_level(logging.WARNING)
    logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, ...")
    logger.warning("something that a user should know")
    logging.getLogger("transformers.modeling_utils").warning("\x1b[1mBert LOAD REPORT from: x")
    # A set: once DeepSpeed is imported, its logger and the root logger may both hand the line on.
    assert {record.getMessage() for record in caplog.records} == {"something that a user should know"}


def test_only_named_warnings_are_ignored() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Use ...", FutureWarning, 2)
        warnings.warn("`torch.compile` is deprecated", FutureWarning, 2)
    assert [str(w.message) for w in caught] == ["`torch.compile` is deprecated"]
