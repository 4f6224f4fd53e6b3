"""One command that says what this project does on a GPU: right or wrong, how fast, how far off."""
