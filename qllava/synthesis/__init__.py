"""Instruction data about images from captions and boxes, by a language model or by rules that never see them."""
