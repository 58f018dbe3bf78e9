"""Instruction data about pictures from captions and boxes, by a language model or by rules that never see them."""
