"""The report of a run that trains: made after its first step, at each checkpoint, and when it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.data.examples import Item
from finetune.report import page, record

log = logging.getLogger(__name__)


class Follower:
    """Of one run. What goes wrong is warned of, once, and never ends the training."""

    def __init__(self, run: Path, leads: bool, wanted: bool) -> None:
        """`leads`: whether this process writes; `wanted`: the page too, not only what the pictures are."""
        self.run, self.leads, self.wanted = run, leads, wanted
        self._begun = self._shown = self._warned = False

    def begin(self, subjects: Sequence[Item], held: Sequence[Item]) -> None:
        """Keep what it trains on in the folder, which is there now."""
        self._begun = True
        self._try(lambda: record.write(self.run, subjects, held))

    def stepped(self) -> None:
        """The page after the first of the steps, which does not wait for it."""
        if not self._shown:
            self.update()

    def update(self) -> None:
        """The page as the run is now."""
        self._shown = True
        if self.wanted:
            self._try(lambda: page.write(self.run, self.run / page.FILE))

    def _try(self, make: Callable[[], None]) -> None:
        if not self.leads or not self._begun:
            return
        try:
            make()
        except Exception as error:  # whatever it is, the training is worth more than its page
            if not self._warned:
                log.warning("%s: the report could not be made: %s", self.run, error)
            self._warned = True
