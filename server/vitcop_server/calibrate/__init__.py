"""``vitcop-calibrate``; see ``command``."""
