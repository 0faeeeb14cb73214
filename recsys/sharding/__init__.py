"""Sharding: what tables cost on a cluster, plans of where they live, and TorchRec's words for both."""
