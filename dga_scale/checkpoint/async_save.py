"""The saves of a run, one after the other: with the training waiting, or in the background.

In the background (``--async_save``) a save copies this rank's shard into host memory, and a thread writes and
syncs the copy into the temporary folder while training goes on. Only main threads communicate: how many saves
a rank has written travels in the small reduction that every step makes anyway (``StopConsensus``), and
once all have written, the checkpoint is committed between two steps. Until then the folder is a temporary
one, as that of any save: killed at any moment, the checkpoint is committed or absent.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from dga_scale.checkpoint.state import Save
from dga_scale.storage.safetensors_stream import Entry


class Saved(NamedTuple):
    """A committed checkpoint."""

    path: Path
    step: int
    seconds: float
    """The seconds for which training stood still."""
    written_seconds: float
    """The seconds from the save's beginning to its commit."""


class Saves:
    """The saves of a rank; one is finished before the next one begins.

    Args:
        background: Whether a thread writes. This costs host memory of the shard's size (12 bytes an entry
            that the rank's optimizer steps; torch rounds each pinned tensor up to a power of two), which is
            kept from one save to the next.

    """

    def __init__(self, background: bool) -> None:
        self.begun = 0
        self._background = background
        self._copies: dict[str, Tensor] = {}
        self._save: Save | None = None
        self._thread: Thread | None = None
        self._started = self._stall = 0.0

    @property
    def written(self) -> int:
        """The number of saves that this rank has written or failed to; ``begun`` if none is being written."""
        return self.begun - (self._thread is not None and self._thread.is_alive())

    def begin(self, save: Save, started: float) -> None:
        """Write ``save``, or start its thread; ``started`` is the time at which it was asked for."""
        assert self._save is None, "a save is under way"
        self._save, self._started = save, started
        self.begun += 1
        if self._background:
            save.entries = self._copied(save.entries)
            self._thread = Thread(target=save.write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            save.write()
        self._stall = time.perf_counter() - started

    def finish(self) -> Saved | None:
        """Wait for the save that is under way and commit it; every rank has to call it.

        Returns:
            The committed checkpoint, or None if no save was under way.

        Raises:
            UserError: Any rank could not write; raised on all, and nothing is under way then.
        """
        if self._save is None:
            return None
        started, save = time.perf_counter(), self._save
        self._save = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        path = save.commit()
        now = time.perf_counter()
        return Saved(path, save.state.step, self._stall + now - started, now - self._started)

    def _copied(self, entries: Sequence[Entry]) -> list[Entry]:
        """Copy tensors into host memory, which is pinned for a GPU and used again by the next save."""
        device = torch.device("cpu")
        for entry in entries:
            tensor = entry.produce()
            device = tensor.device if tensor.is_cuda else device
            copy = self._copies.get(entry.name)
            if copy is None:
                copy = torch.empty(entry.shape, dtype=entry.dtype, pin_memory=tensor.is_cuda)
                self._copies[entry.name] = copy
            copy.copy_(tensor, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return [replace(entry, produce=partial(self._copies.__getitem__, entry.name)) for entry in entries]
