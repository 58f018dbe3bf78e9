"""Two models asked the same question without names, and the votes of those who compare them."""
