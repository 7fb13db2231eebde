"""Profile files: finds and reads those that ship with the package and the user's own, and writes new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.profile import Profile, profile_from_dict, profile_to_dict
from ..errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
# In an installed package the files lie inside it; in a source tree they lie at its top.
_FOLDERS = (_PACKAGE / "profiles", _PACKAGE.parents[1] / "profiles")
_WIDTH = 120
_REMEDY = "give a file that hyperflexis calibrate wrote, or the name of a profile that ships"


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
        raise ConfigError(f"profile {path} cannot be read: {error.strerror}; {_REMEDY}") from error
    except ValueError as error:
        raise ConfigError(f"profile {path} is not JSON: {error}; {_REMEDY}") from error
    return profile_from_dict(data, str(path))


def save_profile(profile: Profile, path: Path) -> None:
    """Write a file that ``load_profile`` reads. Raises ConfigError when it cannot be written."""
    try:
        path.write_text(_text(profile_to_dict(profile)) + "\n")
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be written: {error.strerror}") from error


def _text(value: Any, indent: str = "", used: int = 0) -> str:
    """JSON for people: what fits on a line is on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if used + len(line) <= _WIDTH or not isinstance(value, dict | list | tuple):
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        names = {json.dumps(key): item for key, item in value.items()}
        parts = [f"{name}: {_text(item, inner, len(inner) + len(name) + 3)}" for name, item in names.items()]
        opening, closing = "{}"
    else:
        parts = [_text(item, inner, len(inner) + 1) for item in value]
        opening, closing = "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"
