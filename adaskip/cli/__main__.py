"""`python -m adaskip.cli`: the same as `adaskip`."""

from adaskip.cli import main

main()
