"""Tells a models folder that is gone from one in which models came and went: a volume that is unmounted, or not yet
mounted, leaves an empty folder behind, or what lay there before it was mounted.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from serving.repository.repository import Contents

log = logging.getLogger("serving.folder")

_NAMED = 3


class FolderGuard:
    """Remembers on which device the folder was when it was last as it should be."""

    def __init__(self) -> None:
        self._device: int | None = None
        self.gone = ""
        """Why the last scan is not to be followed; empty where it is."""

    def check(self, contents: Contents, served: Collection[str]) -> str:
        """Say why a scan is not to be followed, and log that where it is new. served: the models that serve now."""
        reason = self._reason(contents, served)
        if reason and reason != self.gone:
            log.error("%s; what is loaded serves on", reason)
        elif self.gone and not reason:
            log.warning("the models folder is back: what it says is followed again")
        self.gone = reason
        return reason

    def _reason(self, contents: Contents, served: Collection[str]) -> str:
        if contents.unreadable:
            return contents.problems[0].reason
        there = {found.name for found in contents.found} | {problem.name for problem in contents.problems}
        missing = sorted(set(served) - there)
        if missing and len(missing) == len(served):
            return (
                f"the models folder holds nothing of what is served ({_listed(missing)}): is its volume mounted? "
                "A restart takes it as it is"
            )
        if missing and contents.device != self._device:
            return (
                f"the models folder is on another device now, and lacks {_listed(missing)}: is its volume mounted? "
                "A restart takes it as it is"
            )
        self._device = contents.device
        return ""


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
