"""`python -m tunekit` and `torchrun -m tunekit`: the same commands as the `tunekit` script."""

from tunekit.cli import main

if __name__ == "__main__":
    main()
