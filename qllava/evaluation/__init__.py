"""Evaluation of models; every score has its number of questions and its uncertainty."""
