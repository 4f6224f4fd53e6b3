"""What mends upstream."""
