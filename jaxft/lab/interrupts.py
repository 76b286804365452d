"""Ctrl-C and SIGTERM as a request to stop at the next event, rather than a loss of work."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax

NOTICE = b"\nStopping at the next event. Ctrl-C again stops at once, without a checkpoint.\n"


class Interrupts:
    """Context in which SIGINT and SIGTERM set ``requested``; a second SIGINT raises ``KeyboardInterrupt`` at once.

    The handlers that were there before are restored on leaving. Off the main thread, where Python delivers no
    signals, nothing is installed.

    Example:
      >>> with Interrupts() as stop:
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     stop.requested, stop.exit_status
      (True, 143)
    """

    def __init__(self):
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop. With several processes a collective: all of them ask at the same events, and agree."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            self._received = int(multihost_utils.process_allgather(self._received).max())
        return self._received != 0

    @property
    def exit_status(self) -> int:
        """What the program returns to its shell: 130 after SIGINT, 143 after SIGTERM, else 0."""
        return 128 + self._received if self._received else 0

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._previous.clear()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        os.write(2, NOTICE)  # print may be what was interrupted
