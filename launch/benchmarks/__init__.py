"""Measurements that print tables and write CSVs: every row says on what it was taken."""
