"""EI² (arXiv 2305.17431): a text-to-image model as a consistent video editor, by two modules tuned on one clip."""
