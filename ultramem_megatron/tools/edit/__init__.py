"""Which values a fact is read from, and a folder in which some of them are switched off."""
