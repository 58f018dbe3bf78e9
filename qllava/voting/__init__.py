"""Blind comparison of two models that are asked the same question, and the votes of users."""
