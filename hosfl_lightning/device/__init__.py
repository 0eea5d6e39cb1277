"""Halves for devices without PyTorch: ``hosfl export-client`` (extra ``device``)."""
