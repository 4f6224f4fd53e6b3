"""Commands about a model; none trains."""
