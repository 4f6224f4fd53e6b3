"""Spans over pipeline stages."""
