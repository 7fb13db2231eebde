"""Errors that a person sees. Each says what is wrong, where, and what to do about it."""

from __future__ import annotations


class HyperFlexisError(Exception):
    """Base of all errors with a message meant for the user. The command line prints it without a traceback."""


class ConfigError(HyperFlexisError):
    """A fleet or workload file is wrong; the message names file, line, field and remedy."""


class IllegalTransition(HyperFlexisError):
    """A request or an instance was asked to move along an edge that its state table does not have."""


class ProtocolError(HyperFlexisError):
    """A peer process sent bytes that are not a message of this version."""
