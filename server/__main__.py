"""``python -m server``: see :mod:`server.launcher`."""

from server.launcher import main

if __name__ == "__main__":
    main()
