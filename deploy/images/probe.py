"""Health check of a container, in an image without curl: exit status 0 if GET on the path (/livez) answers 200."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    """Ask the service in this container and say what is wrong with it."""
    path = sys.argv[1] if len(sys.argv) > 1 else "/livez"
    url = f"http://127.0.0.1:{os.environ.get('CATALENS_HTTP__PORT') or '8080'}{path}"
    try:
        with urllib.request.urlopen(url, timeout=4):
            return 0
    except urllib.error.HTTPError as error:
        print(error.code, error.read(1000).decode(errors="replace"))  # noqa: T201  # `docker inspect` shows it
    except OSError as error:
        print(error)  # noqa: T201  # as above
    return 1


if __name__ == "__main__":
    sys.exit(main())
