"""The only folder that touches the host's internals."""
