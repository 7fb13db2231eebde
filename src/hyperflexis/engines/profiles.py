"""Finds and reads profile files: those that ship with the package, and the user's own by path."""

from __future__ import annotations

import json
from pathlib import Path

from ..core.profile import Profile, profile_from_dict
from ..errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
# In an installed package the files lie inside it; in a source tree they lie at its top.
_FOLDERS = (_PACKAGE / "profiles", _PACKAGE.parents[1] / "profiles")


def shipped_profiles() -> dict[str, Path]:
    """The profiles that come with the package, by name."""
    return {path.stem: path for folder in reversed(_FOLDERS) for path in sorted(folder.glob("*.json"))}


def load_profile(name_or_path: str) -> Profile:
    """The profile of that name, or of the JSON file at that path (anything with a slash or ending in ``.json``).

    Raises ConfigError when there is none or the file is wrong.
    """
    if "/" in name_or_path or name_or_path.endswith(".json"):
        path = Path(name_or_path).expanduser()
    else:
        shipped = shipped_profiles()
        if name_or_path not in shipped:
            names = ", ".join(sorted(shipped)) or "none"
            raise ConfigError(f"no profile is named {name_or_path!r}; give one of {names}, or the path of a JSON file")
        path = shipped[name_or_path]
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"profile {path} is not JSON: {error}") from error
    return profile_from_dict(data, str(path))
