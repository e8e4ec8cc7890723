"""The harness: drives the scripts as subprocesses and works from what they leave on disk."""
