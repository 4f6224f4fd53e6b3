"""Runs that train."""
