"""The client that `execute` talks to a kernel with: it looks for messages again every second.

A reply can lie ready without anybody being woken: where a cell shows an Output widget, nbclient answers the widget on
the very socket on which it waits for the cell's reply, and that may use up the socket's one notification (nbclient's
issue 312). The stock client then waits for ever, and so would `make run`.
"""

import time
from queue import Empty

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from traitlets import Type

LOOK = 1.0  # seconds


class PatientChannel(AsyncZMQSocketChannel):
    """A channel whose every wait is cut into short ones, each of which begins by looking."""

    async def get_msg(self, timeout: float | None = None) -> dict:
        """The next message.

        Raises:
            Empty: there was none within `timeout` seconds.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return await super().get_msg(max(0.0, min(LOOK, end - time.monotonic())))
            except Empty:
                if time.monotonic() >= end:
                    raise


class PatientClient(AsyncKernelClient):
    """The stock client with such channels for replies and outputs."""

    shell_channel_class = Type(PatientChannel)
    iopub_channel_class = Type(PatientChannel)
