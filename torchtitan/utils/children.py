"""Processes that a process starts for itself. No torch."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_parent() -> None:
    """Called in a child of `multiprocessing`: it ends when its parent does, even a killed one.

    Without this a reader outlives a killed run for ever. By process id its parent is the fork
    server, which stays while one of its children does; the kernel's parent-death signal and
    DataLoader's own watchdog look at that one only.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
