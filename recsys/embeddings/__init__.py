"""Field embeddings: ids in, x_BFD out, fields in schema order."""
