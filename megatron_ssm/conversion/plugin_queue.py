"""The two ends of the converter's queue, each of which notices when there is nobody at the other.

A loader that waits for room on the queue looks whether the saver's process lives; a saver that waits for a message,
whether the loader's does. A saver that has failed takes what still comes, so that no loader waits for ever.
"""

from __future__ import annotations

import multiprocessing
import queue as queues
import resource
import sys
from multiprocessing.queues import Queue

from megatron_ssm.conversion.plugin_protocol import DONE, EXIT

_LOOK = 2.0  # seconds after which one looks for the other


class LoaderEnd:
    """Where messages are put.

    Args:
        queue: the converter's.
    """

    def __init__(self, queue):
        _allow_many_files()
        self._queue = queue
        children = multiprocessing.active_children() if isinstance(queue, Queue) else []
        # The converter has one child. Within other programs it is not to be known which it is.
        self._saver = children[0] if len(children) == 1 else None

    def put(self, message: object) -> None:
        """Put a message on the queue, as soon as there is room.

        Raises:
            ValueError: the saver has ended.
        """
        while True:
            try:
                return self._queue.put(message, timeout=_LOOK)
            except queues.Full:
                if self._saver is not None and not self._saver.is_alive():
                    raise self._failure() from None

    def exit(self) -> None:
        """Tell that the loader fails, if there still is somebody to tell."""
        if self._saver is None or self._saver.is_alive():
            self.put(EXIT)

    def wait(self) -> None:
        """Wait until the saver has ended, where it is a process.

        Raises:
            ValueError: it has failed; the converter itself does not look.
        """
        if self._saver is not None:
            self._saver.join()
            if self._saver.exitcode:
                raise self._failure()

    def _failure(self) -> ValueError:
        self._queue.cancel_join_thread()  # or one waits for somebody to take what is on it
        return ValueError(f"the saver has failed (exit code {self._saver.exitcode})")


class SaverEnd:
    """Where messages are taken.

    Args:
        queue: the converter's.
    """

    def __init__(self, queue):
        _allow_many_files()
        self._queue = queue
        self._is_over = False

    def get(self) -> object:
        """The next message; "done" is one.

        Raises:
            ValueError: the loader has failed, or has ended.
        """
        while True:
            try:
                message = self._queue.get(timeout=_LOOK)
            except queues.Empty:
                loader = multiprocessing.parent_process()
                if loader is None or loader.is_alive():
                    continue
                self._is_over = True
                raise ValueError("the loader has ended before it was done") from None
            if isinstance(message, str) and message == EXIT:
                self._is_over = True
                raise ValueError("the loader has failed")
            self._is_over = isinstance(message, str) and message == DONE
            return message

    def drain(self) -> None:
        """Take and forget all that still comes."""
        while not self._is_over:
            try:
                self.get()
            except ValueError as error:
                sys.stderr.write(f"{error}\n")


def _allow_many_files() -> None:
    # A tensor on the queue is an open file, and a layer may have hundreds of experts.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
