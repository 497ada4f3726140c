"""`python -m bitwright.cli`, the same as the `bitwright` command."""

from bitwright.cli import main

main()
