"""A run as others get it: a folder with its files, pictures and card, looked through for what is private, then sent."""
