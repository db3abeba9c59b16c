"""The Lua scripts of all packages."""

from pathlib import Path

import proxy

LUA_SCRIPTS = {path.stem: path for path in Path(proxy.__file__).parent.glob("*/lua/*.lua")}
"""Their files by name."""
