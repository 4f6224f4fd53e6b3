"""Value tables cut over a group of ranks: by rows (number-wise) or by columns (dimension-wise)."""
