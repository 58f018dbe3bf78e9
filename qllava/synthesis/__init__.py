"""Instruction data from the captions and boxes of images, written by a text-only language model or by rules."""
