"""Runs that decode."""
