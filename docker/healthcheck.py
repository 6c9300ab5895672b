"""Exit status 0 if the server on this machine is alive: ``python healthcheck.py [PORT]``.

It requests ``/health``, not ``/ready``, because a draining server is healthy. It is a Python
script because the images have no curl. ``http.client`` ignores proxy variables.
"""

import sys
from http.client import HTTPConnection, HTTPException

TIMEOUT_SECONDS = 4.0


def is_alive(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not is_alive(int(sys.argv[1]) if len(sys.argv) > 1 else 8000))
