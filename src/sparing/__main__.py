"""Entry point of the command line: `sparing`, or `python -m sparing`."""

import sys


def main() -> None:
    """Run the command line. If one of its packages is not installed, print one sentence and exit with status 2."""
    try:
        from sparing.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "sparing").startswith("sparing"):
            raise
        print(f"sparing: {error.name} is not installed; run pip install 'sparing[train]'", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
