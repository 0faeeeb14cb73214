"""Starting jobs on schedulers: torchx components, named resources, and the front `recsys launch`."""
