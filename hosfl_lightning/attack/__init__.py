"""What an honest-but-curious server, or who reads the update log, learns of the clients' data."""
