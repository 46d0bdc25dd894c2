"""`python -m moesim` is the same as `moesim`."""

from moesim.cli import main

if __name__ == "__main__":
    main()
