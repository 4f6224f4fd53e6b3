"""The paper's training experiments: many small models, seeds repeated, one CSV each."""
