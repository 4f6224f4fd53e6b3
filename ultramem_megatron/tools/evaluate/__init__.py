"""How good is a trained model: perplexity of a data set, and tasks of lm-evaluation-harness."""
