"""The paper's tables and computed figures, beside ours."""
