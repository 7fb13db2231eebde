"""``python -m hyperflexis``: how a fleet starts its own processes, whatever the installation's scripts are called."""

from .cli import entry_point

entry_point()
