"""`recsys`: from raw click logs to merged predictions."""

__version__ = "0.1.0"
