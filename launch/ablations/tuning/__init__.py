"""New definitions for a trained model, and what it forgets: `bash launch/ablate_tuning.sh`."""
