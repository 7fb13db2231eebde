"""How many files and sockets this process may have open at once."""

from __future__ import annotations

import contextlib
import resource


def raise_fd_limit(wanted: int) -> int:
    """Raise the soft limit on open descriptors to ``wanted``, or as far as the hard limit allows; return what holds.

    A limit that is higher already is left as it is.
    """
    soft, hard = (_number(n) for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < wanted and soft < hard:
        target = min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # some systems have a lower bound that they do not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            return target
    return soft


def _number(limit: int) -> int:
    return 1 << 62 if limit == resource.RLIM_INFINITY else limit
