"""Scripts that set up the environment and run whole experiments."""
