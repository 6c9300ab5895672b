"""``python -m vitcop_server``, which is ``vitcop-serve``: see :mod:`vitcop_server.launcher`."""

from vitcop_server.launcher import main

if __name__ == "__main__":
    main()
