"""`trine`, and `python -m trine.cli` where the script is not installed."""

import sys


def main() -> None:
    """As `trine.cli.main.main`, whose import takes long enough for a Ctrl-C."""
    try:
        from trine.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
