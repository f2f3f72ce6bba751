"""tunekit: fine-tune models from a YAML recipe. Importing the package imports nothing heavy."""

__version__ = "0.1.0"
