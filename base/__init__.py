"""What everything stands on. It is imported first, so that whatever follows can fail in one line."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (an older one would report syntax errors instead)
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]} ({sys.executable})")

from base import errors

errors.watch_imports()
