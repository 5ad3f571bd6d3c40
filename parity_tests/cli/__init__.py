"""What `python -m parity_tests` does, one file a command."""
