"""What must not be under way in another thread when a child is forked.

A child has one thread only, and what the others held stays locked in it for ever: NVRTC's own locks while it compiles,
and those of modules while they are imported. So a fork waits until no thread is in such a section.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

_free = threading.Condition()
_inside: list[int] = []
"""The threads that are in a section, once for each that they are in."""


@contextlib.contextmanager
def section() -> Iterator[None]:
    """Let forks wait. No lock may be taken within that a thread which forks could hold."""
    thread = threading.get_ident()
    with _free:
        _inside.append(thread)
    try:
        yield
    finally:
        with _free:
            if thread in _inside:  # a child that this very thread forked has forgotten it
                _inside.remove(thread)
            _free.notify_all()


def _before() -> None:
    _free.acquire()  # until the fork is done, so that no thread begins a section
    # A thread that forks within a section of its own, from a signal's handler, is not in NVRTC.
    _free.wait_for(lambda: set(_inside) <= {threading.get_ident()})


def _after_in_parent() -> None:
    _free.release()


def _after_in_child() -> None:
    global _free
    _free = threading.Condition()
    _inside.clear()


def after_in_child(function: Callable[[], object]) -> None:
    """Let `function` run in every forked child; on Windows there are none."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
