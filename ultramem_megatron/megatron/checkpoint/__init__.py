"""The checkpoint's folder, the design stored in it, weights written without a run."""
