"""What the command `rewind` does to a user's own files; its parser is in `cli.py`."""
