"""`python -m trine.cli`: the same command line where the `trine` script is not installed."""

from trine.cli.main import main

if __name__ == "__main__":
    main()
