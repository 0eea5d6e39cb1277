"""A client of split federated fine-tuning without PyTorch."""

__version__ = "0.1.0"
