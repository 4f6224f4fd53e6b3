"""From queries to addresses and scores."""
