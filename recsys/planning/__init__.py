"""`recsys plan`: what a recipe's tables cost on a cluster that need not be there."""
