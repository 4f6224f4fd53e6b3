"""Do two parallel layouts train the same model? `ultramem verify`."""
