"""``python -m qexp`` is the same as ``qexp``."""

from qexp.cli import main

main()
