"""Sizes, FLOPs, memory and traffic of a model, from building it without storage."""
