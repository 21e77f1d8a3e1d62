"""`python -m cascadeserve`."""

from cascadeserve.cli import main

main()
