"""ComfyUI's face of Rewind: one file a wing. A node unpacks, makes one call into `pipelines` and repacks."""
