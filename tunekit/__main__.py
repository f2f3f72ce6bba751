"""Starts and ends the program, for the `tunekit` script, `python -m tunekit` and `torchrun -m tunekit`."""

import gc

# An import makes many objects that are never freed; torch and transformers make hundreds of thousands. Scanning them
# again and again took a fifth of the start (0.6 of 3.3 CPU seconds, measured). Training restores the collector's
# settings.
WHILE_STARTING = (100_000, 20, 100)


def main() -> None:
    """Run the command line. The garbage collector is set up first, and the command line is imported afterwards, because
    its imports need these settings too."""
    gc.set_threshold(*WHILE_STARTING)
    from tunekit.cli import main as run

    try:
        run()
    finally:
        gc.freeze()  # otherwise the interpreter scans all objects once more at its end, a tenth of `validate`


if __name__ == "__main__":
    main()
