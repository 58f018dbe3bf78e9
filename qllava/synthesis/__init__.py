"""Instruction data about pictures, written by what never saw them: a language model, or rules, from captions and boxes."""
