"""The embedded default: a synthetic world with known answers, and tiny models of the real architectures in it."""
