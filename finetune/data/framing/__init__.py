"""Which pixels of a picture are trained: its size, its crops, its mask; and the sheet that shows them."""
