"""Dreamix (arXiv 2302.01329): text-driven editing of a clip by corrupting it and letting a video model restore it."""
