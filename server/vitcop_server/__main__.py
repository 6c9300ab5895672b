"""``python -m vitcop_server`` runs ``vitcop-serve``: see :mod:`vitcop_server.launcher`."""

from vitcop_server.launcher import main

if __name__ == "__main__":
    main()
