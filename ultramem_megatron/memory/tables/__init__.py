"""Value tables, whole or cut over a group of ranks."""
