"""SIGINT (Ctrl-C) and SIGTERM, at a moment that suits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGINT stands last: its usual handler raises, and the other one must be back in place by then.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def deferred() -> Iterator[None]:
    """Let the handlers of SIGINT and SIGTERM wait until the block has ended.

    What belongs together, such as the updates of all parameters, is then done as a whole or not
    at all. A signal without a Python handler ends the process as ever: nothing of its memory is
    left that could be half changed. Outside the main thread, where Python runs no handlers, the
    block is run as it is.
    """
    came: list[tuple[int, FrameType | None]] = []
    with _handling(lambda number, frame: came.append((number, frame))) as handlers:
        yield
    for number, frame in came:
        handlers[number](number, frame)


@contextmanager
def caught() -> Iterator[list[int]]:
    """Collect the numbers of SIGINT and SIGTERM in the list given; a second signal interrupts.

    Outside the main thread nothing is collected.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    with _handling(receive, also_defaults=True):
        yield received


@contextmanager
def _handling(
    handler: Callable[[int, FrameType | None], None], also_defaults: bool = False
) -> Iterator[dict[int, Any]]:
    """Put a handler in the place of those that are there, and give these."""
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            old = signal.getsignal(number)
            if callable(old) or (also_defaults and old == signal.SIG_DFL):
                handlers[number] = old
    try:
        for replaced in handlers:
            signal.signal(replaced, handler)
        yield handlers
    finally:
        for replaced, old in handlers.items():
            signal.signal(replaced, old)
