"""The compression study: what smaller embeddings cost in quality, and gain in bytes and speed."""
