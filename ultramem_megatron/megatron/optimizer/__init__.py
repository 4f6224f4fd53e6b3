"""What the optimizer does to tables and cores."""
