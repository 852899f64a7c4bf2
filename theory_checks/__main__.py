"""``python -m theory_checks``."""

from .command import main

if __name__ == "__main__":
    main()
