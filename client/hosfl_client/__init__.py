"""What a device needs of a federation, without PyTorch."""
