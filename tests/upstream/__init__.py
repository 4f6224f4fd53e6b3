"""Upstream's unit tests on a CPU: `bash tests/upstream.sh`."""
