"""Keeps what torch and TorchRec say about their own insides away from the run's output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MESSAGES = (
    "Please use DTensor instead",  # ShardedTensor, which TorchRec 1.8 is built on
    "`broadcast_buffers` is deprecated",  # an argument that TorchRec gives to DDP
    r"`torch\.distributed\.\w+` is deprecated",  # operations that TorchRec calls
    ".*an autograd kernel was not registered",  # FBGEMM's look-ups of dense rows
    "torch.distributed is disabled, unavailable or uninitialized",  # as load_model intends
)
_LOGGERS = (
    "torch.fx._symbolic_trace",  # on the first KeyedTensor
    "torchrec.distributed.utils",  # that data-parallel tables have no cache
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence known messages that no user of ours can act upon."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, _LOGGERS)]
    with warnings.catch_warnings():
        for message in _MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)
