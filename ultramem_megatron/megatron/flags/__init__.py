"""Command line: our flags, those this machine needs, those that are refused."""
